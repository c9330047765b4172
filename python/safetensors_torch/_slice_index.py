"""Computes the part of a tensor that an index, as in ``tensor[index]``, needs.

Owns the meaning of each kind of item. An index that torch refuses, or whose kind is unknown here, has no bounding box;
the caller then asks torch itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch

# With a larger step torch's strides may overflow, and torch then refuses the index.
_MAX_STEP = 2**31


class Box(NamedTuple):
    """The part of a tensor that an index needs, one range for each dimension, and the index to apply to that part.

    0 <= start <= stop <= size and step >= 1 for each.
    """

    starts: list[int]
    stops: list[int]
    steps: list[int]
    index: tuple[Any, ...]


class _UnknownItem(Exception):
    """An item of an index that only torch can judge."""


def bounding_box(items: tuple[Any, ...], shape: Sequence[int], is_packed: bool) -> Box | None:
    """Returns the bounding box of an index.

    Args:
        items: the index as a tuple.
        shape: the tensor's shape in torch.
        is_packed: whether an element packs several values, so that no step can be read in the last dimension.

    Returns:
        The box, or None if torch refuses one of the items, or may refuse it.
    """
    try:
        left = len(shape) - sum(map(_dimensions, items))
        # Each ellipsis skips as many dimensions as the first one, so torch seldom accepts two.
        if left < 0 or (left > 0 and sum(item is Ellipsis for item in items) > 1):
            return None
        return _box(items, shape, left, is_packed)
    except _UnknownItem:
        return None


def _dimensions(item: Any) -> int:
    """Returns the number of dimensions that an item indexes; 0 for an ellipsis, which takes those that are left."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, (Integral, slice)):
        return 1
    if isinstance(item, torch.Tensor):
        if item.dtype in (torch.bool, torch.uint8):
            return item.dim()
        if not item.dtype.is_floating_point and not item.dtype.is_complex:
            return 1
    # torch converts such a list to a tensor. Bools would be a mask.
    elif isinstance(item, list) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in item):
        return 1
    raise _UnknownItem


def _box(items: tuple[Any, ...], shape: Sequence[int], left: int, is_packed: bool) -> Box:
    """Returns the box if an ellipsis stands for ``left`` dimensions."""
    ranges: list[tuple[int, int, int]] = []
    inner: list[Any] = []
    sizes = iter(shape)
    for item in items:
        if isinstance(item, slice):
            ranges.append(_slice_range(item, next(sizes)))
            inner.append(slice(None))
            if is_packed and len(ranges) == len(shape):
                start, stop, step = ranges[-1]
                ranges[-1] = (start, stop, 1)
                inner[-1] = slice(None, None, step)
        elif _is_int(item):
            ranges.append(_int_range(int(item), next(sizes)))
            inner.append(0)
        else:
            ranges.extend(_full_ranges(sizes, left if item is Ellipsis else _dimensions(item)))
            inner.append(item)
    ranges.extend((0, size, 1) for size in sizes)
    starts, stops, steps = ([part[i] for part in ranges] for i in range(3))
    return Box(starts, stops, steps, tuple(inner))


def _is_int(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        is_number = item.dim() == 0 and item.dtype not in (torch.bool, torch.uint8)
        return is_number and type(item) is torch.Tensor and not item.is_meta
    return isinstance(item, Integral) and not isinstance(item, bool)


def _full_ranges(sizes: Iterator[int], count: int) -> Iterator[tuple[int, int, int]]:
    return ((0, next(sizes), 1) for _ in range(count))


def _int_range(index: int, size: int) -> tuple[int, int, int]:
    if not -size <= index < size:
        raise _UnknownItem
    start = index + size if index < 0 else index
    return (start, start + 1, 1)


def _slice_range(item: slice, size: int) -> tuple[int, int, int]:
    parts = []
    for part in (item.start, item.stop, item.step):
        try:
            parts.append(part if part is None else operator.index(part))
        except Exception:
            raise _UnknownItem from None
    if parts[2] is not None and not 0 < parts[2] <= _MAX_STEP:
        raise _UnknownItem
    start, stop, step = slice(*parts).indices(size)
    # A step beyond the size selects the first element only.
    return (start, max(start, stop), min(step, max(size, 1)))
