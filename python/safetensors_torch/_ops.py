"""load_file, load, save_file and save: the operators with the argument types and the checks of Python.

Owns what only Python can know of a call: buffers, names, whether a mode is watching. _arguments and _checks have the
rest. Everything about the format and about the tensors' memory is checked by the native library.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import _buffer
from ._arguments import Device, Path, check_backend, check_dtype, check_flag, check_shared, encode_path, to_device
from ._checks import Metadata, Tensors, check_tensors, check_text, unseen
from ._dynamo import opaque
from ._errors import call, shown
from ._steps import STEP, Progress, check_progress, run

# Which tensors of a file: all, those of these names, or those for whose name the function is true.
Names = Iterable[str] | Callable[[str], Any] | None

_ops = torch.ops.safetensors_torch
_load_file = _ops._load_file_lists.default
_load = _ops._load_lists.default
_load_shared = _ops._load_shared_lists.default
_open_bytes = _ops._open_bytes.default
_File = torch.classes.safetensors_torch.File
_PendingSave = torch.classes.safetensors_torch.PendingSave

# Loads of less than this, in bytes, are over before anybody could interrupt them.
_LARGE = 256 << 20


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the cycle collector from running, as from Python 3.12 on it never does inside of one call into C.

    A load makes as many objects as the file has tensors and drops none, so that before 3.12 the collector looks
    through all of them again and again, for nothing. The switch is the whole process's: other threads collect nothing
    meanwhile either, and one that turns the collector off at this very moment finds it on again.
    """
    global _is_collection_paused
    if sys.version_info >= (3, 12) or not gc.isenabled():
        yield
        return
    _is_collection_paused = True
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        _is_collection_paused = False


# Whether some thread is in the block above with the collector off.
_is_collection_paused = False


def _resume_collection() -> None:
    """In a process that was forked meanwhile, and in which that thread is not."""
    global _is_collection_paused
    if _is_collection_paused:
        gc.enable()
        _is_collection_paused = False


os.register_at_fork(after_in_child=_resume_collection)


def open_file(filename: Path, backend: str) -> Any:
    """The native File for ``filename``."""
    return call(_File, encode_path(filename), check_backend(backend))


def open_bytes(data: torch.Tensor) -> Any:
    """The native File over the bytes of ``data``, which must stay where they are."""
    return call(_open_bytes, data)


def select(file: Any, names: Names) -> list[str] | None:
    """The names to load, for the operators; None means all.

    Raises:
        TypeError: a str alone, or what is neither iterable nor callable, or a name that is no str.
    """
    if names is None:
        return None
    if callable(names):
        return [name for name in call(file.offset_keys) if names(name)]
    if isinstance(names, (str, bytes)):
        raise TypeError(f"names must be a list of names, or a function of a name, not {shown(names)} alone")
    chosen = list(names)
    for name in chosen:
        check_text(name, f"the name {shown(name)}")
    return chosen


def is_traced() -> bool:
    """Whether a mode, such as FakeTensorMode, wants to see operators, instead of what they do."""
    return torch._C._len_torch_dispatch_stack() > 0


def _is_small(path: bytes) -> bool:
    """Whether a file is no large one. One that is not there is not either, which whoever opens it finds out."""
    try:
        return os.stat(path).st_size < _LARGE
    except OSError:
        return True


def _load_with(op: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The dict of the names and tensors that ``op`` gives as two lists."""
    with _no_collection():
        names, tensors = call(op, *args, **kwargs)
        return dict(zip(names, tensors))


def bring_in(file: Any, device: torch.device, backend: str, prefault: bool | None, names: Names) -> None:
    """Has a mapping's pages brought in where ``prefault`` asks for it, or where nothing is said and all is loaded."""
    if device.type == "cpu" and backend == "mmap" and (prefault or (prefault is None and names is None)):
        call(file.prefault, prefault is not None)


def load_in_steps(
    file: Any, device: torch.device, dtype: torch.dtype | None, names: Names, progress: Progress
) -> dict[str, torch.Tensor]:
    pending = call(file.start_load, select(file, names), device, dtype)
    run(pending, pending.total, progress, "load")
    return _load_with(pending.result)


@opaque
def load_file(
    filename: Path,
    device: Device = "cpu",
    *,
    backend: str = "mmap",
    prefault: bool | None = None,
    dtype: torch.dtype | None = None,
    names: Names = None,
    progress: Progress = None,
) -> dict[str, torch.Tensor]:
    """Loads the tensors of a safetensors file.

    Args:
        filename: the file; str, bytes or os.PathLike.
        device: where the tensors shall be; a name, a torch.device, the index of an accelerator, or None for the CPU.
            Where the device has streams, work that is queued on its current stream after this call sees the tensors.
        backend: "mmap" maps the file: CPU tensors are read when they are touched, and writing to one changes memory
            only. A file that another process cuts short meanwhile ends this one with SIGBUS. "pread" reads the
            file into memory that the tensors own. What goes to a device is read with either.
        prefault: what becomes of mapped pages before they are touched. None lets threads in the background bring the
            file in while the caller goes on, if it loads all of it; what is not in memory yet is read with large reads,
            unless the file takes more than half of the memory that is available. True has the whole file in when the
            call returns. False leaves every page to the first touch. No matter with "pread", for other devices than the
            CPU, or before Linux 5.14.
        dtype: a floating-point dtype that floating-point tensors are converted to, on the device, some MiB at a time;
            others stay as they are. None converts nothing.
        names: the tensors to load, by name, or a function that is true for the names of those; others are not read.
        progress: True shows a bar, if tqdm is installed; a function is called with the bytes done and the bytes in all,
            some ten times a second, and at the end. What it raises ends the load. A load that maps the file reads
            nothing: there is no bar, and the function is called once, with 0 and 0. Under a mode of torch's that looks
            at operators it is not called.

    Returns:
        The tensors by name, in the order of their data in the file, each with the shape in the header.

    Raises:
        SafetensorError: the file is not valid safetensors, or holds a dtype that torch has not; another backend; a name
            that the file does not have; a dtype that cannot be converted.
        OSError: it cannot be read (FileNotFoundError, IsADirectoryError, PermissionError and so on).
        MemoryError, torch.OutOfMemoryError: there is not enough memory for the tensors, or to map the file.
        ValueError: a negative device, a dtype that is not floating-point, or a null byte in the file name.
        TypeError: an argument of another type.
        RuntimeError: a device that torch does not know or cannot use.
        ImportError: progress=True without tqdm.

    Example:
        >>> save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, path)
        >>> load_file(path, names=["bias"])
        {'bias': tensor([0., 0.])}
        >>> load_file(path, backend="pread", dtype=torch.float16)["weight"].dtype
        torch.float16
    """
    if prefault is not None:
        check_flag(prefault, "prefault")
    path, target, backend = encode_path(filename), to_device(device), check_backend(backend)
    dtype, progress = check_dtype(dtype), check_progress(progress)
    is_plain = dtype is None and names is None and not progress
    mapped = target.type == "cpu" and backend == "mmap"
    is_quick = mapped or target.type == "meta" or (target.type == "cpu" and _is_small(path))
    if is_plain and (is_quick or is_traced()):
        return _load_with(_load_file, path, device=target, backend=backend, prefault=prefault)
    file = open_file(path, backend)
    if is_traced():
        chosen = select(file, names)
        return call(_ops.load_file, path, device=target, backend=backend, prefault=prefault, dtype=dtype, names=chosen)
    bring_in(file, target, backend, prefault, names)
    return load_in_steps(file, target, dtype, names, progress)


@opaque
def load(
    data: Any,
    device: Device = "cpu",
    *,
    copy: bool = True,
    dtype: torch.dtype | None = None,
    names: Names = None,
    progress: Progress = None,
) -> dict[str, torch.Tensor]:
    """Loads the tensors of a safetensors file that is in memory.

    Args:
        data: the contents of the file, in bytes or any other object with the buffer protocol (bytearray, memoryview,
            mmap, an array), of any item type; or an object with ``readinto`` (a file opened with "rb", a BytesIO, a
            member of a zip, what ``socket.makefile("rb")`` returns), which is read from where it stands to its end.
        device: where the tensors shall be, as for load_file.
        copy: False lets the tensors share the memory of ``data``, which must be writable and contiguous and stays
            exported while one of them lives; tensors whose data is not aligned to their dtype are copied all the
            same. Only for the CPU, and for all tensors as they are.
        dtype: what floating-point tensors are converted to, as for load_file.
        names: which tensors to load, as for load_file.
        progress: who is told how far it is, as for load_file.

    Returns:
        The tensors by name, in the order of their data, each with the shape in the header.

    Raises:
        SafetensorError: the bytes are not valid safetensors, or hold a dtype that torch has not; a name that is not in
            there; a dtype that cannot be converted.
        MemoryError, torch.OutOfMemoryError: there is not enough memory for the tensors.
        TypeError: ``data`` has neither the buffer protocol nor ``readinto``, or an argument of another type.
        OSError: what reading ``data`` raises.
        ValueError: copy=False with a read-only or scattered buffer, another device than the CPU, dtype or names; a
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
    target, dtype, progress = to_device(device), check_dtype(dtype), check_progress(progress)
    if copy:
        with _buffer.borrowed(data) as tensor:
            is_plain = dtype is None and names is None and not progress
            if is_plain and target.type == "cpu" and tensor.numel() < _LARGE:
                return _load_with(_load, tensor, device=target)
            if not is_traced():
                return load_in_steps(open_bytes(tensor), target, dtype, names, progress)
            if dtype is None and names is None:
                return _load_with(_load, tensor, device=target)
            chosen = select(open_bytes(tensor), names)
            return call(_ops.load, tensor, device=target, dtype=dtype, names=chosen)
    if target.type != "cpu":
        raise ValueError(f"copy=False shares the buffer's memory, which tensors on {target} cannot. Pass copy=True")
    if dtype is not None or names is not None:
        raise ValueError("copy=False gives all tensors of the buffer as they are there. Pass copy=True, or neither")
    return _load_with(_load_shared, _buffer.shared(data))


@opaque
def save_file(
    tensors: dict[str, torch.Tensor],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    force_contiguous: bool = False,
    shared: str = "error",
    durable: bool = False,
    progress: Progress = None,
) -> None:
    """Saves tensors into a safetensors file, which appears complete or not at all.

    Args:
        tensors: the tensors by name: dense, contiguous, on any device, no two sharing memory. Those of a subclass of
            Tensor are saved as tensors, without a call of its ``__torch_function__``.
        filename: the file, replaced if it exists; str, bytes or os.PathLike. A symbolic link is replaced, and what it
            leads to stays as it is.
        metadata: text to store in the header; None stores none, an empty dict an empty object.
        force_contiguous: True writes tensors that are not contiguous as if they were, one copy at a time; False refuses
            them.
        shared: what becomes of tensors that share memory. "error" refuses them. "keep_one" writes of each group the
            first name, alphabetically, whose tensor covers the whole memory. The others are left out, and added to the
            file's metadata with the name that was kept, as save_model does; the caller's dicts stay as they are.
        durable: whether to return only once the file is on the disk, so that it survives a loss of power (fsync of
            the file and its directory). Otherwise the kernel brings it there within half a minute or so.
        progress: True shows a bar, if tqdm is installed; a function is called with the bytes done and the bytes in all,
            some ten times a second, and at the end. What it raises ends the save: no file is written, unless it was
            complete already.

    Raises:
        ValueError: not a dict of tensors, a tensor that is sparse, nested, not contiguous, or without a shape (lazy
            modules); another word for ``shared``.
        RuntimeError: tensors that share memory, with "keep_one" if none of them covers it; a tensor on the meta device
            or a fake one; one whose storage is too small for it, or is resized during the save.
        TypeError: a key, or a metadata key or value, that is no str.
        UnicodeEncodeError: one of those with a lone surrogate.
        SafetensorError: a dtype that the format has not, a tensor without memory of its own (a wrapper subclass such as
            DTensor), or one called ``__metadata__``.
        OSError: the file cannot be written.

    Nothing is written if a check fails.

    Example:
        >>> save_file({"weight": torch.ones(2, 3)}, path, metadata={"format": "pt"}, durable=True)
        >>> weight = torch.ones(2, 3)
        >>> save_file({"weight": weight, "row": weight[0]}, path)
        Traceback (most recent call last):
        RuntimeError: Some tensors share memory, ...
    """
    check_flag(durable, "durable")
    progress, rules = check_progress(progress), check_rules(force_contiguous, shared)
    tensors, metadata = check_tensors(tensors, metadata, **rules)
    path = encode_path(filename)
    with _disable_current_modes():
        plan = _plan(tensors, metadata, path, **rules)
        write(plan, progress, plan.start_file, path, durable)


@opaque
def save(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    *,
    force_contiguous: bool = False,
    shared: str = "error",
    progress: Progress = None,
) -> bytes:
    """Saves tensors as the bytes of a safetensors file.

    Args:
        tensors: as for save_file.
        metadata: as for save_file.
        force_contiguous: as for save_file.
        shared: as for save_file.
        progress: as for save_file.

    Returns:
        The bytes, which save_file would write.

    Raises:
        What save_file raises, but for OSError.

    Example:
        >>> load(save({"x": torch.arange(3)}))
        {'x': tensor([0, 1, 2])}
    """
    progress, rules = check_progress(progress), check_rules(force_contiguous, shared)
    tensors, metadata = check_tensors(tensors, metadata, **rules)
    with _disable_current_modes():
        plan = _plan(tensors, metadata, b"", **rules)
        return _buffer.new_bytes(call(plan.size), lambda out: write(plan, progress, plan.start_into, out))


def write(plan: Any, progress: Progress, start: Callable[..., bool], *args: Any) -> None:
    """Has ``plan`` written, beginning with ``start``. Most saves are over with the first step."""
    try:
        if not call(start, *args, 0.0 if progress else STEP) or progress:
            run(plan, plan.size, progress, "save")
    except BaseException:
        plan.cancel()
        raise


def check_rules(force_contiguous: Any, shared: Any) -> dict[str, Any]:
    """What a save takes beside tensors that are contiguous and share no memory, for the native library."""
    return {"force_contiguous": check_flag(force_contiguous, "force_contiguous"), "shared": check_shared(shared)}


def _plan(tensors: Tensors, metadata: Metadata, path: bytes, *, force_contiguous: bool, shared: str) -> Any:
    """The save of ``tensors``, checked and laid out. ``path`` is for the errors."""
    with unseen():
        return call(_PendingSave, list(tensors), list(tensors.values()), metadata, path, force_contiguous, shared)
