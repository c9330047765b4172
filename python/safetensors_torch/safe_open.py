"""safe_open: reads a safetensors file, or one in memory, tensor by tensor or slice by slice.

Owns the Python classes over the native File. _slice_index turns an index into one range for each dimension, and File
reads the bytes of those ranges.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from . import _buffer
from ._arguments import Device, to_device
from ._errors import SafetensorError, call, short_repr, truncate
from ._load import open_bytes, open_file
from ._progress import run
from ._slice_index import bounding_box

_FRAMEWORKS = ("pt", "torch", "pytorch")


def _is_contents(filename: Any) -> bool:
    """Returns whether this is the contents of a file, or an open file, instead of a file name."""
    if isinstance(filename, bytes):
        # Both may be bytes: every file has a null byte among its first eight, and no file name has one.
        return b"\0" in filename[:8]
    if isinstance(filename, (str, os.PathLike)):
        return False
    try:
        memoryview(filename).release()
    except TypeError:
        return hasattr(filename, "readinto")
    return True


def _check_tensor_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of a tensor must be a str, not {type(name).__name__}")
    if not _has_utf8(name):
        raise _missing_tensor(name.encode("utf-8", "backslashreplace").decode())
    return name


def _missing_tensor(name: str) -> SafetensorError:
    """Returns the error with the reference's text, which programs look for. The native text also names the file."""
    return SafetensorError(f"File does not contain tensor {truncate(name)}")


def _get_existing(file: Any, name: str, get: Callable[[Any, str], Any]) -> Any:
    """Returns ``get(file, name)``, and raises the reference's error if there is no such tensor."""
    try:
        return get(file, name)
    except SafetensorError:
        if not call(file.contains, name):
            raise _missing_tensor(name) from None
        raise


def _has_utf8(text: str) -> bool:
    """Returns whether a file can have this name: a lone surrogate has no UTF-8, and no operator accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class safe_open:  # noqa: N801 - the name that users of safetensors know
    """A safetensors file, open for reading. It is a context manager, whose end closes the file.

    Tensors and slices remain valid after that. Threads and forked processes may share it; it cannot be pickled or
    copied.

    Args:
        filename: the file; str, bytes or os.PathLike. Or contents, as for load: bytes, another object with the buffer
            protocol, which stays exported as long as this is open or a slice of it exists, or an open file, which is
            read to its end. Tensors are then copies.
        framework: "pt", "torch" or "pytorch", which all mean torch.
        device: the device of the tensors, as for load_file.
        backend: "mmap" or "pread", as for load_file. Two reads of one tensor share memory with "mmap", and do not with
            "pread". Ignored for contents.

    Raises:
        SafetensorError: the file is not valid safetensors, ``framework`` is not torch, or another backend.
        OSError: the file cannot be read.

    Example:
        >>> save_file({"weight": torch.arange(6.0).reshape(2, 3)}, path)
        >>> with safe_open(path) as file:
        ...     print(file.keys(), file.get_slice("weight")[1, ::2])
        ['weight'] tensor([3., 5.])
    """

    def __init__(self, filename: Any, framework: str = "pt", device: Device = "cpu", *, backend: str = "mmap") -> None:
        if framework not in _FRAMEWORKS:
            raise SafetensorError(
                f"framework {short_repr(framework)} is invalid: this library is for torch (one of"
                f" {', '.join(map(repr, _FRAMEWORKS))}); the package safetensors serves the others"
            )
        self._device = to_device(device)
        is_contents = _is_contents(filename)
        self._title = type(filename).__name__ if is_contents else short_repr(filename)
        # Whether tensors are views of a mapping.
        self._is_mapped = not is_contents and backend == "mmap" and self._device.type == "cpu"
        # Keeps the memory of contents alive.
        self._view: memoryview | None = None
        self._open: Any | None = None
        if is_contents:
            data, view = _buffer.exported(filename)
            try:
                self._open, self._view = open_bytes(data), view
            except BaseException:
                view.release()  # the traceback would keep it
                raise
        else:
            self._open = open_file(filename, backend)

    def __enter__(self) -> safe_open:
        self._file()
        return self

    def __exit__(self, *error: object) -> None:
        # Not File.close(): slices share the File, and the last of them closes it.
        self._open = self._view = None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled or copied: in another process, the path may lead to another file."""
        raise TypeError(
            f"cannot pickle or copy {self!r}: threads and forked processes may share it; any other process must open"
            f" the file itself: safe_open({self._title})"
        )

    def __repr__(self) -> str:
        state = "closed" if self._open is None else "open"
        return f"<safe_open {self._title} on {self._device}, {state}>"

    def _file(self) -> Any:
        file = self._open
        if file is None:
            raise SafetensorError("File is closed")
        return file

    def keys(self) -> list[str]:
        """Returns the names of the tensors, sorted."""
        return call(self._file().keys)

    def offset_keys(self) -> list[str]:
        """Returns the names of the tensors in the order of their data in the file."""
        return call(self._file().offset_keys)

    def metadata(self) -> dict[str, str] | None:
        """Returns the metadata in the header, or None if it has none."""
        return call(self._file().metadata)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor called ``name``, on the device of this handle, with the dtype and shape in the header.

        Raises:
            SafetensorError: there is no such tensor, the file is closed, or torch lacks the dtype.
        """
        return _get_existing(
            self._file(), _check_tensor_name(name), lambda file, name: _get_tensor(file, name, self._device)
        )

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Returns all tensors by name, in the order of their data in the file, on the device of this handle.

        Raises:
            SafetensorError: the file is closed, or torch lacks a dtype.
        """
        pending = call(self._file().start_load, None, self._device, None, False)
        run(pending, None, "load")
        names, tensors = call(pending.result)
        return dict(zip(names, tensors, strict=True))

    def get_slice(self, name: str) -> PySafeSlice:
        """Returns the tensor called ``name``, unread: index the result to read a part of it.

        Raises:
            SafetensorError: there is no such tensor, or the file is closed.
        """
        return _get_existing(self._file(), _check_tensor_name(name), self._slice)

    def _slice(self, file: Any, name: str) -> PySafeSlice:
        return PySafeSlice(file, name, self._device, self._is_mapped, self._view)

    def __contains__(self, name: object) -> bool:
        file = self._file()
        return isinstance(name, str) and _has_utf8(name) and call(file.contains, name)

    def __len__(self) -> int:
        return call(self._file().size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


# The kernel reads a smaller part together with the first page.
_READ_AHEAD_BYTES = 128 << 10


class PySafeSlice:
    """A tensor in an open file, to read in part: ``[index]`` returns what ``tensor[index]`` returns.

    With "pread", from memory, and to other devices than the CPU, an index of ints, slices, ``...``, None and bools
    reads only the bytes that it selects. A list of ints or a tensor among them reads all of its dimensions; the other
    items still limit theirs. Any other index (a list of lists, an array) reads the whole tensor first.
    """

    def __init__(
        self, file: Any, name: str, device: torch.device, is_mapped: bool, view: memoryview | None = None
    ) -> None:
        self._file = file
        self._name = name
        self._device = device
        self._is_mapped = is_mapped
        self._view = view
        self._shape: list[int]
        self._dtype: str
        self._shape, self._dtype = call(file.shape_and_dtype, name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled or copied, like the handle."""
        raise TypeError(
            f"cannot pickle or copy {self!r}: send the tensors, or open the file in the other process:"
            f" safe_open(path).get_slice({short_repr(self._name)})"
        )

    def __repr__(self) -> str:
        return f"<slice of {short_repr(self._name)}: {self._dtype} {self._shape}>"

    def get_shape(self) -> list[int]:
        """Returns the shape in the header. For F4 the last dimension is twice that of torch's packed dtype."""
        return self._shape.copy()

    def get_dtype(self) -> str:
        """Returns the dtype's code in the header, such as "F32"."""
        return self._dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Returns the part that ``index`` selects, on the device of the handle.

        Raises:
            IndexError, ValueError, TypeError: torch refuses the index for this shape.
            SafetensorError: torch lacks the dtype, or the file was truncated.
        """
        if self._is_mapped:
            # A view of the mapping: only the pages that are accessed are read.
            part = call(self._file.view, self._name)[index]
            if part.nbytes >= _READ_AHEAD_BYTES:
                call(self._file.read_ahead, self._name, part)
            return part
        like = call(self._file.get_tensor, self._name, torch.device("meta"))
        items = index if isinstance(index, tuple) else (index,)
        box = bounding_box(items, like.shape, is_packed=list(like.shape) != self._shape)
        if box is None:
            # A tensor of this shape without memory: torch refuses a wrong index before anything is read.
            torch.empty((), dtype=like.dtype, device=self._device).expand(like.shape)[index]
            return _get_tensor(self._file, self._name, self._device)[index]
        pending = call(self._file.start_slice, self._name, box.starts, box.stops, box.steps, self._device)
        run(pending, None, "load")
        return call(pending.result)[box.index]


def _get_tensor(file: Any, name: str, device: torch.device) -> torch.Tensor:
    """Returns one tensor; loads to another device than the CPU in steps."""
    if device.type == "cpu":
        return call(file.get_tensor, name, device)
    pending = call(file.start_load, [name], device, None, False)
    run(pending, None, "load")
    _, (tensor,) = call(pending.result)
    return tensor
