"""PySafeSlice: a tensor in an open file, to read in part.

_slice_index turns an index into one range for each dimension, and the native File reads the bytes of those ranges.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ._errors import NamedFile, call, short_repr
from ._progress import run
from ._slice_index import bounding_box

# The kernel reads a smaller part together with the first page.
_READ_AHEAD_BYTES = 128 << 10


class PySafeSlice:
    """A tensor in an open file, to read in part: ``[index]`` returns what ``tensor[index]`` returns.

    With "pread", from memory, and to other devices than the CPU, an index of ints, slices, ``...``, None and bools
    reads only the bytes that it selects. A list of ints or a tensor among them reads all of its dimensions; the other
    items still limit theirs. Any other index (a list of lists, an array) reads the whole tensor first.
    """

    def __init__(
        self,
        file: Any,
        name: str,
        title: str,
        device: torch.device,
        is_mapped: bool,
        view: memoryview | None = None,
    ) -> None:
        self._file = file
        self._name = name
        self._title = title
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

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor, as torch has it."""
        return torch.Size(call(self._file.tensor_shape, self._name))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self._shape)

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype of the tensor.

        Raises:
            SafetensorError: torch lacks it.
        """
        return self._meta().dtype

    def _meta(self) -> torch.Tensor:
        with NamedFile(self._title):
            return call(self._file.get_tensor, self._name, torch.device("meta"))

    def __len__(self) -> int:
        """Returns the size of the first dimension."""
        if not self._shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __bool__(self) -> bool:
        return True  # like the reference's, which has no length

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Returns the part that ``index`` selects, on the device of the handle.

        Raises:
            IndexError, ValueError, TypeError: torch refuses the index for this shape.
            SafetensorError: torch lacks the dtype, or the file was truncated.
        """
        if self._is_mapped:
            # A view of the mapping: only the pages that are accessed are read.
            with NamedFile(self._title):
                view = call(self._file.view, self._name)
            part = view[index]
            if part.nbytes >= _READ_AHEAD_BYTES:
                call(self._file.read_ahead, self._name, part)
            return part
        like = self._meta()
        items = index if isinstance(index, tuple) else (index,)
        box = bounding_box(items, like.shape, is_packed=list(like.shape) != self._shape)
        if box is None:
            # A tensor of this shape without memory: torch refuses a wrong index before anything is read.
            torch.empty((), dtype=like.dtype, device=self._device).expand(like.shape)[index]
            return get_tensor(self._file, self._name, self._device)[index]
        pending = call(self._file.start_slice, self._name, box.starts, box.stops, box.steps, self._device)
        run(pending, None, "load")
        return call(pending.result)[box.index]


def get_tensor(file: Any, name: str, device: torch.device) -> torch.Tensor:
    """Returns one tensor; loads to another device than the CPU in steps."""
    if device.type == "cpu":
        return call(file.get_tensor, name, device)
    pending = call(file.start_load, [name], device, None, False)
    run(pending, None, "load")
    _, (tensor,) = call(pending.result)
    return tensor
