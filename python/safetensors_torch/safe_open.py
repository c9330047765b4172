"""safe_open: an open safetensors file, read tensor by tensor or slice by slice.

Owns the Python face of the native class File and the meaning of ``get_slice(name)[index]``. It reads nothing itself
and computes no offset: an index becomes one range for each dimension, and File knows the bytes behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from types import TracebackType
from typing import Any, Optional

import torch

from ._arguments import Device, Path, to_device
from ._errors import SafetensorError, call
from ._ops import open_file
from ._steps import run

_FRAMEWORKS = ("pt", "torch", "pytorch")


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of a tensor is a str, not {type(name).__name__}")
    if not _is_unicode(name):
        raise _absent(name.encode("utf-8", "backslashreplace").decode())
    return name


def _absent(name: str) -> SafetensorError:
    """The text by which programs know the error: without the file, which the native one names."""
    return SafetensorError(f"File does not contain tensor {name}")


def _is_unicode(text: str) -> bool:
    """Whether a file can have this name. A lone surrogate has no UTF-8, and the operators do not take it for a str."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class safe_open:  # noqa: N801 - the name that users of safetensors know
    """A safetensors file, open for reading. A context manager; leaving it closes the file.

    Tensors and slices that were taken before go on working after that.

    Args:
        filename: the file; str, bytes or os.PathLike.
        framework: "pt", "torch" or "pytorch", which all mean torch.
        device: where tensors shall be, as for load_file.
        backend: "mmap" or "pread", as for load_file. With "mmap", two reads of one tensor share memory; with
            "pread" never.

    Raises:
        SafetensorError: the file is not valid safetensors, ``framework`` is not torch, or another backend.
        OSError: the file cannot be read.

    Example:
        >>> save_file({"weight": torch.arange(6.0).reshape(2, 3)}, path)
        >>> with safe_open(path) as file:
        ...     print(file.keys(), file.get_slice("weight")[1, ::2])
        ['weight'] tensor([3., 5.])
    """

    def __init__(self, filename: Path, framework: str = "pt", device: Device = "cpu", *, backend: str = "mmap") -> None:
        if framework not in _FRAMEWORKS:
            raise SafetensorError(
                f"framework {framework!r} is invalid: this library is for torch (one of"
                f" {', '.join(map(repr, _FRAMEWORKS))}); the package safetensors serves the others"
            )
        self._device = to_device(device)
        self._backend = backend
        self._filename = filename
        self._open: Optional[Any] = open_file(filename, backend)

    def __enter__(self) -> safe_open:
        self._file()
        return self

    def __exit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        # Not File.close(): slices share the File, and the last of them closes it.
        self._open = None

    def __repr__(self) -> str:
        state = "closed" if self._open is None else "open"
        return f"<safe_open {self._filename!r} on {self._device}, {state}>"

    def _file(self) -> Any:
        file = self._open
        if file is None:
            raise SafetensorError("File is closed")
        return file

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return call(self._file().keys)

    def offset_keys(self) -> list[str]:
        """The names of the tensors in the order of their data in the file."""
        return call(self._file().offset_keys)

    def metadata(self) -> Optional[dict[str, str]]:
        """The text in the header, or None where it has none."""
        return call(self._file().metadata)

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor called ``name``, on the device of this handle, with the dtype and shape in the header.

        Raises:
            SafetensorError: no such tensor, the file is closed, or torch has no such dtype.
        """
        file, name = self._file(), _name(name)
        try:
            return _get_tensor(file, name, self._device)
        except SafetensorError:
            if not call(file.contains, name):
                raise _absent(name) from None
            raise

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, in the order of their data in the file, on the device of this handle.

        Raises:
            SafetensorError: the file is closed, or torch has not the dtype of one of them.
        """
        pending = call(self._file().start_load, None, self._device, None)
        run(pending, pending.total, None, "load")
        names, tensors = call(pending.result)
        return dict(zip(names, tensors))

    def get_slice(self, name: str) -> PySafeSlice:
        """The tensor called ``name``, not read yet: index the result to read a part of it.

        Raises:
            SafetensorError: no such tensor, or the file is closed.
        """
        file, name = self._file(), _name(name)
        if not call(file.contains, name):
            raise _absent(name)
        return PySafeSlice(file, name, self._device, self._backend)

    def __contains__(self, name: object) -> bool:
        file = self._file()
        return isinstance(name, str) and _is_unicode(name) and call(file.contains, name)

    def __len__(self) -> int:
        return call(self._file().size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


class PySafeSlice:
    """A tensor in an open file, to be read in part: ``[index]`` gives what the tensor itself would give.

    With the backend "pread", an index of ints, slices and ``...`` reads only the bytes that it selects. Any other
    index (None, a bool, a list, a tensor) reads the whole tensor first.
    """

    def __init__(self, file: Any, name: str, device: torch.device, backend: str) -> None:
        self._file = file
        self._name = name
        self._device = device
        self._backend = backend
        self._shape: list[int] = call(file.shape, name)

    def __repr__(self) -> str:
        return f"<slice of {self._name!r}: {self.get_dtype()} {self._shape}>"

    def get_shape(self) -> list[int]:
        """The shape in the header, in elements. For F4 the last dimension is twice that of torch's packed dtype."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The dtype's code in the header, such as "F32"."""
        return call(self._file.dtype, self._name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The part that ``index`` selects, on the device of the handle that this slice was taken from.

        Raises:
            IndexError, ValueError, TypeError: what torch raises for this index and shape.
            SafetensorError: torch has no such dtype, or the file shrank meanwhile.
        """
        items = index if isinstance(index, tuple) else (index,)
        if not all(map(_is_basic, items)):
            return _get_tensor(self._file, self._name, self._device)[index]
        if self._backend == "mmap" and self._device.type == "cpu":
            # A view of the mapping: only the pages that it touches are read.
            return call(self._file.get_tensor, self._name, self._device)[index]
        shape = call(self._file.tensor_shape, self._name)
        # Torch itself judges the index, so that its exceptions are the ones raised, and gives the shape.
        result_shape = torch.empty(shape, device="meta")[index].shape
        # An empty result needs no bytes, wherever it lies.
        ranges = _ranges(items, shape) if 0 not in result_shape else [(0, 0, 1)] * len(shape)
        starts, stops, steps = ([r[i] for r in ranges] for i in range(3))
        pending = call(self._file.start_slice, self._name, starts, stops, steps, self._device)
        run(pending, pending.total, None, "load")
        return call(pending.result).view(result_shape)


def _get_tensor(file: Any, name: str, device: torch.device) -> torch.Tensor:
    """One tensor, in steps where it goes to a device."""
    if device.type == "cpu":
        return call(file.get_tensor, name, device)
    pending = call(file.start_load, [name], device, None)
    run(pending, pending.total, None, "load")
    _, (tensor,) = call(pending.result)
    return tensor


def _is_basic(item: Any) -> bool:
    if isinstance(item, slice):
        return all(part is None or isinstance(part, Integral) for part in (item.start, item.stop, item.step))
    return item is Ellipsis or (isinstance(item, Integral) and not isinstance(item, bool))


def _ranges(items: tuple[Any, ...], shape: list[int]) -> list[tuple[int, int, int]]:
    """An index of ints, slices and ``...``, which torch has accepted, as (start, stop, step) a dimension.

    0 <= start <= stop <= size and step >= 1 for each; an int selects a range of one. The first ``...`` stands for the
    dimensions that the other items leave, each further one for none.
    """
    named = [item for item in items if item is not Ellipsis]
    at = next((i for i, item in enumerate(items) if item is Ellipsis), len(named))
    named[at:at] = [slice(None)] * (len(shape) - len(named))
    ranges = []
    for item, size in zip(named, shape):
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            # A step beyond the size selects the first element whatever it is, and may not fit the operators' int.
            ranges.append((start, max(start, stop), min(step, max(size, 1))))
        else:
            start = int(item) + (size if item < 0 else 0)
            ranges.append((start, start + 1, 1))
    return ranges
