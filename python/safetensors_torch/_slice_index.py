"""From an index, as ``tensor[index]`` takes it, to the part of a tensor that has to be read for it.

Owns the meaning of each kind of item, and nothing of torch's exceptions: an index that torch refuses, or of a kind
that is not known here, has no bounding box, and torch is then asked itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch

# With a larger step torch's strides may overflow, and then it refuses it.
_MOST_STEP = 2**31


class Box(NamedTuple):
    """The part of a tensor that an index needs, one range for each dimension, and the index inside of that part.

    0 <= start <= stop <= size and step >= 1 for each.
    """

    starts: list[int]
    stops: list[int]
    steps: list[int]
    rest: tuple[Any, ...]


class _Unknown(Exception):
    """An item about which torch is to be asked."""


def bounding_box(items: tuple[Any, ...], shape: Sequence[int], is_packed: bool) -> Box | None:
    """The bounding box of an index of ``items``.

    Args:
        items: the index as a tuple.
        shape: that of the tensor in torch.
        is_packed: whether its elements are values packed in bytes, of which no steps can be read in the last dimension.

    Returns:
        None where torch refuses one of the items, or may.
    """
    try:
        left = len(shape) - sum(map(_dimensions, items))
        # Each ellipsis skips as many dimensions as the first one, so that torch seldom takes two.
        if left < 0 or (left > 0 and sum(item is Ellipsis for item in items) > 1):
            return None
        return _box(items, shape, left, is_packed)
    except _Unknown:
        return None


def _dimensions(item: Any) -> int:
    """How many dimensions of the tensor the item stands for; those of an ellipsis are what the others leave."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, (Integral, slice)):
        return 1
    if isinstance(item, torch.Tensor):
        if item.dtype in (torch.bool, torch.uint8):
            return item.dim()
        if not item.dtype.is_floating_point and not item.dtype.is_complex:
            return 1
    # Torch takes these for a tensor. Bools would be a mask.
    elif isinstance(item, list) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in item):
        return 1
    raise _Unknown


def _box(items: tuple[Any, ...], shape: Sequence[int], left: int, is_packed: bool) -> Box:
    """The box where an ellipsis stands for ``left`` dimensions."""
    ranges: list[tuple[int, int, int]] = []
    rest: list[Any] = []
    sizes = iter(shape)
    for item in items:
        if isinstance(item, slice):
            ranges.append(_of_slice(item, next(sizes)))
            rest.append(slice(None))
            if is_packed and len(ranges) == len(shape):
                start, stop, step = ranges[-1]
                ranges[-1] = (start, stop, 1)
                rest[-1] = slice(None, None, step)
        elif _is_int(item):
            ranges.append(_of_int(int(item), next(sizes)))
            rest.append(0)
        else:
            ranges.extend(_whole(sizes, left if item is Ellipsis else _dimensions(item)))
            rest.append(item)
    ranges.extend((0, size, 1) for size in sizes)
    starts, stops, steps = ([part[i] for part in ranges] for i in range(3))
    return Box(starts, stops, steps, tuple(rest))


def _is_int(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        is_number = item.dim() == 0 and item.dtype not in (torch.bool, torch.uint8)
        return is_number and type(item) is torch.Tensor and not item.is_meta
    return isinstance(item, Integral) and not isinstance(item, bool)


def _whole(sizes: Iterator[int], count: int) -> Iterator[tuple[int, int, int]]:
    return ((0, next(sizes), 1) for _ in range(count))


def _of_int(index: int, size: int) -> tuple[int, int, int]:
    if not -size <= index < size:
        raise _Unknown
    start = index + size if index < 0 else index
    return (start, start + 1, 1)


def _of_slice(item: slice, size: int) -> tuple[int, int, int]:
    parts = []
    for part in (item.start, item.stop, item.step):
        try:
            parts.append(part if part is None else operator.index(part))
        except Exception:
            raise _Unknown from None
    if parts[2] is not None and not 0 < parts[2] <= _MOST_STEP:
        raise _Unknown
    start, stop, step = slice(*parts).indices(size)
    # A step beyond the size selects the first element, whatever it is.
    return (start, max(start, stop), min(step, max(size, 1)))
