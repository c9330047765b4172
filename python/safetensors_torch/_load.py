"""load_file and load: the tensors of a file, or of bytes in memory.

Owns what only Python knows of such a call: buffers, the choice of names, and whether a mode is watching. The native
library checks the format and makes the tensors.
"""

from __future__ import annotations

import fnmatch
import gc
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import _buffer
from ._arguments import (
    Device,
    Dtype,
    Path,
    check_bool,
    check_dtype,
    check_text,
    encode_input_path,
    path_text,
    to_device,
    to_keyword,
)
from ._errors import NamedFile, SafetensorError, call, names_instead, short_repr, with_remedy
from ._keywords import explains_keywords
from ._locations import RemotePath, located
from ._progress import Progress, check_progress, run
from ._tracing import dynamo_disable, is_traced

# The tensors to load: all of them, those of these names or globs, those that the pattern finds, or those for whose name
# the function is true.
Names = Iterable[str] | re.Pattern[str] | Callable[[str], Any] | None

_ops = torch.ops.safetensors_torch
_load_file = _ops._load_file_lists.default
_load = _ops._load_lists.default
_load_shared = _ops._load_shared_lists.default
_open_bytes = _ops._open_bytes.default
_File = torch.classes.safetensors_torch.File

# Smaller loads finish before anybody could interrupt them.
_LARGE_BYTES = 256 << 20


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Pauses the cycle collector before Python 3.12, from which on it never runs inside of a call into C.

    A load makes one object for each tensor and frees none, so the collector would traverse all of them repeatedly. It
    pauses for the whole process. If another thread disables it during that time, it is enabled again afterwards.
    """
    global _is_gc_paused
    if sys.version_info >= (3, 12) or not gc.isenabled():
        yield
        return
    _is_gc_paused = True
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        _is_gc_paused = False


# Whether a thread has paused the collector.
_is_gc_paused = False


def _resume_gc() -> None:
    """Enables the collector in a forked child, which lacks the thread that paused it."""
    global _is_gc_paused
    if _is_gc_paused:
        gc.enable()
        _is_gc_paused = False


os.register_at_fork(after_in_child=_resume_gc)


def open_file(filename: Path | RemotePath, backend: str) -> Any:
    """Opens the native File of one file."""
    if isinstance(filename, RemotePath):
        from . import _remote

        return _remote.open_file(filename)
    return call(_File, encode_input_path(filename), to_keyword(backend))


def open_bytes(data: torch.Tensor) -> Any:
    """Opens the native File over the bytes of ``data``, which the caller keeps alive."""
    return call(_open_bytes, data)


def select(file: Any, names: Names) -> list[str] | None:
    """Returns the names to load, for the operators; None means all.

    Raises:
        TypeError: ``names`` is a single str, or neither iterable nor callable, or a name is not a str.
    """
    if names is None:
        return None
    if isinstance(names, re.Pattern):
        names = names.search
    if callable(names):
        return [name for name in call(file.offset_keys) if names(name)]
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        alone = short_repr(names)
        raise TypeError(
            f"names must be a list of names or globs, a compiled pattern, or a function of a name, not {alone} alone;"
            f" pass names=[{alone}]"
        )
    chosen: list[str] = []
    for name in names:
        check_text(name, f"the name {short_repr(name)}")
        chosen += _expand(file, name)
    return list(dict.fromkeys(chosen))


def _expand(file: Any, name: str) -> list[str]:
    """Returns the names that a glob matches, or ``name`` itself if a tensor has it or nothing matches."""
    if not any(character in name for character in "*?[") or call(file.contains, name):
        return [name]
    return fnmatch.filter(call(file.offset_keys), name) or [name]


def _call_with_names(
    file: Any, chosen: list[str] | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls ``function``, and adds the remedy to its error about a chosen name that the file lacks."""
    try:
        return call(function, *args, **kwargs)
    except SafetensorError as error:
        missing = next((name for name in chosen or () if not call(file.contains, name)), None)
        if missing is None:
            raise
        raise with_remedy(error, names_instead(missing, call(file.keys))) from None


def _is_small(path: bytes) -> bool:
    """Returns whether a file is small. A missing file counts as small; opening it reports the error."""
    try:
        return os.stat(path).st_size < _LARGE_BYTES
    except OSError:
        return True


def _load_with(op: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Returns the names and tensors, which ``op`` returns as two lists, as a dict."""
    with _gc_paused():
        names, tensors = call(op, *args, **kwargs)
        return dict(zip(names, tensors, strict=True))


def load_in_steps(
    file: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    names: Names,
    progress: Progress,
    prefault: bool | None = None,
) -> dict[str, torch.Tensor]:
    chosen = select(file, names)
    pending = _call_with_names(file, chosen, file.start_load, chosen, device, dtype, prefault)
    run(pending, progress, "load")
    return _load_with(pending.result)


@dynamo_disable
@explains_keywords
def load_file(
    filename: Path,
    device: Device = "cpu",
    *,
    backend: str = "mmap",
    prefault: bool | None = None,
    dtype: Dtype = None,
    names: Names = None,
    progress: Progress = None,
    filesystem: Any = None,
) -> dict[str, torch.Tensor]:
    """Loads the tensors of a safetensors file.

    Args:
        filename: the file; str, bytes or os.PathLike. Or a URL, as a str: ``s3://``, ``gs://``, ``az://``,
            ``https://``, ``hf://``, or what fsspec knows. Reads only what is needed, with many requests at once.
        device: the device of the tensors: a name, a torch.device, the index of an accelerator, or None for the CPU.
            Work that is queued later on the device's current stream sees the loaded data.
        backend: "mmap" maps the file: pages of CPU tensors are read on first access, and writing to a tensor changes
            memory only. If another process truncates the file, an access ends this process (SIGBUS). "pread" reads the
            file into memory that the tensors own. Loads to another device read with both.
        prefault: whether to bring the pages of a mapped file into memory. None: background threads do so after the call
            returns, if all tensors are loaded; they skip a file that is not in the page cache and larger than half of
            the available memory. True: all pages are in memory when the call returns. False: on first access. Ignored
            with "pread", for other devices, and before Linux 5.14.
        dtype: a floating-point dtype, or its name ("float16", "bf16"), to convert floating-point tensors to, on the
            device, in pieces of a few MiB. None converts nothing.
        names: the names of the tensors to load, which may be globs ("layers.0.*"); a compiled pattern, which is
            searched for in each name; or a function that returns whether to load a name.
        progress: True shows a bar of tqdm. A function is called with the bytes done and the total, about ten times a
            second and at the end; an exception from it ends the load. A load that maps the file reads nothing: there is
            no bar, and the function is called once, with 0 and 0. It is not called under torch's dispatch modes.
        filesystem: a store of obstore or a filesystem of fsspec; ``filename`` is then a path in it. By default the
            client for the URL, with the credentials that this client finds.

    Returns:
        The tensors by name, in the order of their data in the file, each with the shape in the header.

    Raises:
        SafetensorError: the file is not valid safetensors; torch lacks a dtype, or cannot convert it; an unknown
            backend; a name that the file lacks.
        OSError: the file cannot be read (FileNotFoundError, IsADirectoryError, PermissionError and so on).
        MemoryError, torch.OutOfMemoryError: there is not enough memory for the tensors, or to map the file.
        ValueError: a negative device, a dtype that is unknown or not floating-point, or a null byte in the file name.
        TypeError: an argument of another type.
        RuntimeError: a device that torch does not know or cannot use.
        ImportError: progress=True without tqdm; a URL without its client.

    Example:
        >>> save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, path)
        >>> load_file(path, names=["bias"])
        {'bias': tensor([0., 0.])}
        >>> load_file(path, backend="pread", dtype=torch.float16)["weight"].dtype
        torch.float16
    """
    if prefault is not None:
        check_bool(prefault, "prefault")
    target, backend = to_device(device), to_keyword(backend)
    to_dtype, progress = check_dtype(dtype), check_progress(progress)
    filename = located(filename, filesystem)
    if isinstance(filename, RemotePath):
        with NamedFile(filename.title):
            return load_in_steps(open_file(filename, backend), target, to_dtype, names, progress)
    path = encode_input_path(filename)
    is_plain = to_dtype is None and names is None and not progress
    mapped = target.type == "cpu" and backend == "mmap"
    is_quick = mapped or target.type == "meta" or (target.type == "cpu" and _is_small(path))
    with NamedFile(path_text(path)):
        if is_plain and (is_quick or is_traced()):
            return _load_with(_load_file, path, device=target, backend=backend, prefault=prefault)
        file = open_file(path, backend)
        if is_traced():
            chosen = select(file, names)
            options = {"device": target, "backend": backend, "prefault": prefault, "dtype": to_dtype, "names": chosen}
            return _call_with_names(file, chosen, _ops.load_file, path, **options)
        return load_in_steps(file, target, to_dtype, names, progress, prefault)


@dynamo_disable
@explains_keywords
def load(
    data: Any,
    device: Device = "cpu",
    *,
    copy: bool = True,
    dtype: Dtype = None,
    names: Names = None,
    progress: Progress = None,
) -> dict[str, torch.Tensor]:
    """Loads the tensors of a safetensors file that is in memory.

    Args:
        data: the contents of the file: bytes or another object with the buffer protocol (bytearray, memoryview, mmap,
            an array), of any item type; or an object with ``readinto`` (a file opened with "rb", a BytesIO, a member of
            a zip, ``socket.makefile("rb")``), which is read from its position to its end.
        device: the device of the tensors, as for load_file.
        copy: False makes the tensors share the memory of ``data``, which must be writable and contiguous and stays
            exported as long as one of them lives. Tensors whose data is not aligned to their dtype are still copied.
            Only for the CPU, without dtype and names.
        dtype: the dtype to convert floating-point tensors to, as for load_file.
        names: the tensors to load, as for load_file.
        progress: a bar or a function, as for load_file.

    Returns:
        The tensors by name, in the order of their data, each with the shape in the header.

    Raises:
        SafetensorError: the bytes are not valid safetensors; torch lacks a dtype, or cannot convert it; a name that the
            data lacks.
        MemoryError, torch.OutOfMemoryError: there is not enough memory for the tensors.
        TypeError: ``data`` has neither the buffer protocol nor ``readinto``, or an argument of another type.
        OSError: reading ``data`` failed.
        ValueError: copy=False with a read-only or non-contiguous buffer, another device, dtype or names; a
            dtype that is not floating-point.
        ImportError: progress=True without tqdm.

    Example:
        >>> data = bytearray(save({"x": torch.zeros(2)}))
        >>> load(data)
        {'x': tensor([0., 0.])}
        >>> load(data, copy=False)["x"].fill_(1)
        tensor([1., 1.])
        >>> load(data)
        {'x': tensor([1., 1.])}
    """
    target, to_dtype, progress = to_device(device), check_dtype(dtype), check_progress(progress)
    if copy:
        with _buffer.borrowed(data) as tensor:
            is_plain = to_dtype is None and names is None and not progress
            if is_plain and target.type == "cpu" and tensor.numel() < _LARGE_BYTES:
                return _load_with(_load, tensor, device=target)
            if not is_traced():
                return load_in_steps(open_bytes(tensor), target, to_dtype, names, progress)
            if to_dtype is None and names is None:
                return _load_with(_load, tensor, device=target)
            file = open_bytes(tensor)
            chosen = select(file, names)
            return _call_with_names(file, chosen, _ops.load, tensor, device=target, dtype=to_dtype, names=chosen)
    if target.type != "cpu":
        raise ValueError(f"copy=False shares the buffer's memory, which tensors on {target} cannot. Pass copy=True")
    if to_dtype is not None or names is not None:
        raise ValueError(
            "copy=False returns all tensors of the buffer as they are. Pass copy=True, or neither dtype nor names"
        )
    return _load_with(_load_shared, _buffer.shared(data))
