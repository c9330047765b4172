"""PrefetchLoader: hands out tensors as soon as their bytes have landed.

Owns the plan of safe_open.prefetch. The native loader reads, and hands out each tensor once.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping
from types import EllipsisType
from typing import Any, NamedTuple, NoReturn

import torch

from ._arguments import has_utf8
from ._errors import SafetensorError, call, short_repr
from ._progress import STEP_SECONDS
from ._slice_index import bounding_box

_PrefetchPlan = torch.classes.safetensors_torch.PrefetchPlan

# An item of an index that needs no data.
_Basic = int | slice | EllipsisType | None
# What to read of each tensor: all of it, some of its rows, or what an index selects.
Plan = Mapping[str, slice | tuple[_Basic, ...] | None] | None


class TensorMeta(NamedTuple):
    """A tensor in the header of a file."""

    dtype: str
    """The code of its dtype, such as "F32"."""
    shape: list[int]
    """Its shape; for F4 the last dimension is twice that of torch's packed dtype."""
    data_offsets: tuple[int, int]
    """The begin and the end of its bytes, from the start of the data."""


class PrefetchLoader:
    """The tensors of a prefetch, each handed out once: by take, or by iteration in the order in which they land.

    Threads read in the background. It is a context manager, whose end closes it, and threads may share it. The handle
    that it was made from may be closed before.
    """

    # Whether the program may use tensors of a device on any stream: then the host waits for their copies.
    _is_for_every_stream = False

    def __init__(
        self, native: Any, title: str, indices: dict[str, tuple[Any, ...]], view: memoryview | None = None
    ) -> None:
        self._native = native
        self._names: list[str] = call(native.names)
        self._title = title
        # The indices that are left to apply to what was read.
        self._indices = indices
        # Keeps the memory of contents alive.
        self._view = view

    def __del__(self) -> None:
        # Closes without the GIL, which the threads of a device may need, and before the garbage collector releases the
        # view that threads read from.
        native = getattr(self, "_native", None)
        if native is not None:
            call(native.close)

    def names(self) -> list[str]:
        """Returns the names of the tensors, in the order of their data in the file."""
        return self._names.copy()

    def __len__(self) -> int:
        """Returns the number of tensors, including those that were handed out."""
        return len(self._names)

    def __bool__(self) -> bool:
        return True  # also without tensors: it is not a container

    def take(self, name: str) -> torch.Tensor:
        """Returns the tensor called ``name``. Waits for it; its bytes are read before those of others.

        Raises:
            SafetensorError: it is not in the plan, or was handed out before; the loader is closed; the file was
                truncated.
            OSError: the file cannot be read.
            MemoryError, torch.OutOfMemoryError: there is not enough memory.
            TypeError: ``name`` is not a str.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a tensor must be a str, not {type(name).__name__}")
        if not has_utf8(name):
            raise SafetensorError(f"tensor {ascii(name)} is not in the prefetch plan")
        while (tensor := call(self._native.take, name, STEP_SECONDS)) is None:
            pass
        return self._part(name, tensor)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the names and tensors that were not handed out, in the order in which they land."""
        for item in landed(self._native):
            yield item[0], self._part(*item)

    def _part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._is_for_every_stream and tensor.device.type not in ("cpu", "meta"):
            torch.accelerator.current_stream(tensor.device).synchronize()
        index = self._indices.get(name)
        return tensor if index is None else tensor[index]

    def close(self) -> None:
        """Stops reading and frees the tensors that were not handed out; the others remain valid."""
        call(self._native.close)

    def __enter__(self) -> PrefetchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PrefetchLoader of {len(self)} tensors in {self._title}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled or copied: the threads that read are in this process."""
        raise TypeError(f"cannot pickle or copy {self!r}: send the tensors, or prefetch in the other process")


def landed(native: Any, progress: Callable[[int, int], Any] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what a native loader hands out; calls ``progress`` about ten times a second, and at the end."""
    total = call(native.total)
    reported = time.monotonic()
    is_left = True
    while is_left:
        is_left, item = call(native.next, STEP_SECONDS)
        if progress and is_left and time.monotonic() - reported >= STEP_SECONDS:
            progress(call(native.done), total)
            reported = time.monotonic()
        if item is not None:
            yield item
            del item  # while the next one is awaited, only the caller keeps it
    if progress:
        progress(total, total)


def start(
    files: list[Any],
    names: list[list[str] | None],
    slices: list[list[list[int]]],
    device: torch.device,
    dtype: torch.dtype | None,
    buffer_bytes: int | None,
    threads: int,
) -> Any:
    """Starts a native loader of tensors of native Files; see PrefetchPlan::add for names and slices."""
    plan = _PrefetchPlan()
    for file, chosen, parts in zip(files, names, slices, strict=True):
        call(plan.add, file, chosen, parts)
    return call(plan.start, device, dtype, buffer_bytes, threads)


class _Part(NamedTuple):
    """What is read of a tensor, and the index to apply to it."""

    ranges: list[int]
    index: tuple[Any, ...] | None


_WHOLE = _Part([], None)


def parse_plan(file: Any, plan: Plan, require: Callable[[str], None]) -> tuple[Any, Any, dict[str, tuple[Any, ...]]]:
    """Returns the names and the slices of a plan for start(), and the indices to apply to what was read.

    Args:
        file: the native File.
        plan: the plan.
        require: raises the error about a name that the file lacks.

    Raises:
        SafetensorError: the plan is empty, or has a slice that does not fit its tensor.
        TypeError: it is not a plan.
        IndexError, ValueError: torch refuses an index.
    """
    if plan is None:
        return None, [], {}
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must be a dict of names to None, slices or tuples, not {type(plan).__name__}")
    if not plan:
        raise SafetensorError("the prefetch plan selects no tensors; leave it out to read all of them")
    names, slices, indices = [], [], {}
    for name, entry in plan.items():
        require(name)
        part = _WHOLE if entry is None else _parse_entry(file, name, entry)
        names.append(name)
        slices.append(part.ranges)
        if part.index is not None:
            indices[name] = part.index
    return names, slices, indices


def _parse_entry(file: Any, name: str, entry: Any) -> _Part:
    if not isinstance(entry, (slice, tuple)):
        raise TypeError(
            f"the prefetch plan of {short_repr(name)} must be None or a slice of its rows, or an index as a tuple, not"
            f" {type(entry).__name__}"
        )
    like = call(file.get_tensor, name, torch.device("meta"))
    if isinstance(entry, slice):
        _check_rows(name, entry, list(like.shape))
        entry = (entry,)
    box = bounding_box(entry, like.shape, is_packed=list(like.shape) != call(file.shape, name))
    if box is None:
        # A tensor of this shape without memory: torch says why it refuses the index.
        torch.empty((), dtype=like.dtype).expand(like.shape)[entry]
        raise TypeError(
            f"the prefetch plan of {short_repr(name)} has an index of an unknown kind, {short_repr(entry)}; use ints,"
            " slices, ..., None and lists of ints, or index the whole tensor"
        )
    is_box = all(isinstance(item, slice) and item == slice(None) for item in box.index)
    return _Part([*box.starts, *box.stops, *box.steps], None if is_box else box.index)


def _check_rows(name: str, rows: slice, shape: list[int]) -> None:
    """Checks a bare slice by the rules of safetensors: it has step 1, and its bounds are within the first dimension."""
    what = f"the slice of {short_repr(name)} in the prefetch plan"
    if not shape:
        raise SafetensorError(f"{what}: the tensor is 0-d, so it has no rows; pass None")
    try:
        bounds = (rows.start, rows.stop, rows.step)
        start, stop, step = (bound if bound is None else operator.index(bound) for bound in bounds)
    except TypeError:
        raise SafetensorError(f"{what}: its bounds must be ints or None, not those of {rows}") from None
    if step == 0:
        raise SafetensorError(f"invalid prefetch plan slice of {short_repr(name)}: its step is 0; pass 1 or more")
    if step not in (None, 1):
        raise SafetensorError(f"{what} must have step 1, not {step}; for other steps pass a tuple: ({rows},)")
    for bound in (start, stop):
        if bound is not None and not -shape[0] <= bound <= shape[0]:
            raise SafetensorError(f"{what}: {bound} is out of range for {shape[0]} rows; slices here are not clipped")
