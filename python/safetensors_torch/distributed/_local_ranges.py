"""local_ranges: the elements of a distributed tensor that one rank holds.

Owns the arithmetic of placements. It needs no process group, so one process can plan for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

from .._errors import short_repr

Range = tuple[int, int]


def local_ranges(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int] | None, placements: Sequence[Any]
) -> list[list[Range]]:
    """Returns the elements of a DTensor that the rank at one coordinate of its mesh holds.

    The local tensor consists of the elements whose index is in these ranges in every dimension, in the order of the
    ranges. ``Shard`` gives at most one range, ``_StridedShard`` (FSDP2 with tensor parallelism) possibly several.

    Args:
        shape: of the whole tensor.
        mesh_shape: the number of ranks in each dimension of the device mesh.
        coordinate: of the rank in the mesh, an index in each of its dimensions, as from ``DeviceMesh.get_coordinate``.
        placements: ``Shard``, ``Replicate`` or ``_StridedShard`` for each dimension of the mesh, as in
            ``DTensor.placements``. They apply from left to right, and several may shard one dimension.

    Returns:
        For each dimension of the tensor the ranges ``(begin, end)``, none of them empty, neighbours merged. The rank
        holds no elements if a dimension has no range. A scalar has no dimensions and one element.

    Raises:
        ValueError: lengths that differ, no coordinate or one outside of the mesh, or a dimension that the tensor lacks.
        TypeError: a placement of another kind. The ranks of a ``Partial`` tensor hold summands, not elements.

    Example:
        >>> from torch.distributed.tensor import Replicate, Shard
        >>> local_ranges([10, 4], [2, 4], [0, 3], [Replicate(), Shard(0)])
        [[(9, 10)], [(0, 4)]]
    """
    if coordinate is None:
        raise ValueError("this rank is not in the mesh, so it holds no part of the tensor")
    if not len(mesh_shape) == len(coordinate) == len(placements):
        raise ValueError(
            f"a mesh of {len(mesh_shape)} dimensions, a coordinate of {len(coordinate)} and {len(placements)} "
            "placements; give one coordinate and one placement for each dimension of the mesh"
        )
    ranges = [[(0, size)] if size > 0 else [] for size in shape]
    for ranks, rank, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if not 0 <= rank < ranks:
            raise ValueError(f"coordinate {tuple(coordinate)} is outside of a mesh of {tuple(mesh_shape)}")
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise TypeError(
                f"placement {short_repr(placement)} does not divide a tensor into parts; redistribute the tensor to "
                "Shard or Replicate first"
            )
        if not -len(ranges) <= placement.dim < len(ranges):
            raise ValueError(
                f"placement {placement!r} shards dimension {placement.dim}, and the tensor has {len(ranges)}"
            )
        held = ranges[placement.dim]
        size = sum(end - begin for begin, end in held)
        pieces = getattr(placement, "split_factor", 1)
        chunks = (_chunk(_chunk((0, size), pieces, piece), ranks, rank) for piece in range(pieces))
        ranges[placement.dim] = _merge(part for chunk in chunks for part in _take(held, chunk))
    return ranges


def _chunk(whole: Range, count: int, index: int) -> Range:
    """Returns number ``index`` of the ``count`` chunks that ``torch.chunk`` makes; later ones can be empty."""
    begin, end = whole
    size = -(-(end - begin) // count)
    return min(begin + index * size, end), min(begin + (index + 1) * size, end)


def _take(ranges: list[Range], wanted: Range) -> Iterator[Range]:
    """Returns the part ``wanted`` of the concatenation of ``ranges``."""
    before = 0
    for begin, end in ranges:
        first, last = max(wanted[0] - before, 0), min(wanted[1] - before, end - begin)
        if first < last:
            yield begin + first, begin + last
        before += end - begin


def _merge(ranges: Iterator[Range]) -> list[Range]:
    merged: list[Range] = []
    for begin, end in ranges:
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged
