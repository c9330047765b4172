"""The chunks of tensors that processes hold: boxes of elements, and which process writes which.

Owns the checks that all chunks together are each tensor, once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from .._arguments import check_name
from ._local_ranges import local_ranges

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of the elements of a tensor: ``sizes`` of them from ``offsets`` on, in each dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def box(self) -> Box:
        return self.offsets, self.sizes


def local_chunks(state_dict: Mapping[str, Any], dtype: torch.dtype | None = None) -> list[tuple[Chunk, torch.Tensor]]:
    """Returns the chunks that this process holds, with their elements, as views.

    A DTensor is held as its placements say, any other tensor as a whole.

    Args:
        state_dict: tensors by name.
        dtype: the dtype in the file of floating-point tensors; each keeps its own if it is None.

    Raises:
        TypeError: a name that is not text, or a value that is not a tensor.
        ValueError: a sparse or nested tensor, or a DTensor whose placements do not divide it.
    """
    chunks = []
    for name, value in state_dict.items():
        check_name(name)
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{name!r} is {type(value).__name__}: safetensors files contain tensors only; leave it out, or save it"
                " in the metadata as text"
            )
        stored = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
        for box, view in _boxes(name, value):
            chunks.append((Chunk(name, stored, tuple(value.shape), *box), view))
    return chunks


def _boxes(name: str, value: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else f"of the layout {value.layout}"
        raise ValueError(f"tensor {name!r} is {kind}: a checkpoint has dense tensors; convert it to one")
    if not isinstance(value, DTensor):
        yield ((0,) * value.dim(), tuple(value.shape)), value.detach()
        return
    mesh = value.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return
    try:
        ranges = local_ranges(value.shape, mesh.shape, coordinate, value.placements)
    except (TypeError, ValueError) as error:
        raise type(error)(f"tensor {name!r}: {error}") from None
    local = value.detach().to_local()
    yield from boxes_of(ranges, local.wait() if isinstance(local, AsyncCollectiveTensor) else local)


def boxes_of(ranges: list[list[tuple[int, int]]], local: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """Returns the boxes of a local tensor whose elements have ``ranges``, each with its part of that tensor.

    A tensor without elements has one box, so that its name and its shape are known.
    """
    held = [sum(end - begin for begin, end in dim) for dim in ranges]
    if held != list(local.shape):
        raise ValueError(f"the local tensor has shape {list(local.shape)}, but its placements say {held}")
    if 0 in held:
        yield ((0,) * len(held), tuple(held)), local
        return
    starts = [list(itertools.accumulate((end - begin for begin, end in dim), initial=0)) for dim in ranges]
    for box in itertools.product(*(zip(dim, start, strict=False) for dim, start in zip(ranges, starts, strict=True))):
        view = local
        for dim, ((begin, end), start) in enumerate(box):
            view = view.narrow(dim, start, end - begin)
        yield (tuple(begin for (begin, _), _ in box), tuple(end - begin for (begin, end), _ in box)), view


def assign(chunks: list[list[Chunk]]) -> tuple[dict[str, Chunk], list[list[int]]]:
    """Decides which process writes which chunk, if several hold it: the one that has the fewest bytes to write.

    Args:
        chunks: those of each process.

    Returns:
        One chunk of each tensor, by name, in the order in which the processes have them; and the chunks that each
        process writes, as indices of its own.

    Raises:
        ValueError: processes have different dtypes or shapes of a tensor, or its chunks overlap or leave a gap.
    """
    tensors: dict[str, Chunk] = {}
    holders: dict[tuple[str, Box], list[tuple[int, int]]] = {}
    for rank, held in enumerate(chunks):
        for index, chunk in enumerate(held):
            first = tensors.setdefault(chunk.name, chunk)
            if (first.dtype, first.shape) != (chunk.dtype, chunk.shape):
                raise ValueError(
                    f"tensor {chunk.name!r}: rank {rank} has {chunk.dtype} of shape {list(chunk.shape)}, and another"
                    f" process {first.dtype} of shape {list(first.shape)}; save tensors that are the same everywhere"
                )
            holders.setdefault((chunk.name, chunk.box), []).append((rank, index))
    check_boxes(tensors, (key for key in holders))
    written: list[list[int]] = [[] for _ in chunks]
    load = [0] * len(chunks)
    for held_by in holders.values():
        rank, index = min(held_by, key=lambda holder: (load[holder[0]], holder[0]))
        written[rank].append(index)
        load[rank] += chunks[rank][index].nbytes
    return tensors, written


def check_boxes(tensors: Mapping[str, Any], named: Iterable[tuple[str, Box]]) -> None:
    """Checks that the boxes of each tensor are all of its elements, and do not overlap.

    Args:
        tensors: objects with a ``shape``, by name.
        named: the name of the tensor and the box, for each box.

    Raises:
        ValueError: they overlap, or leave a gap.
    """
    boxes: dict[str, list[Box]] = {name: [] for name in tensors}
    for name, box in named:
        if 0 not in box[1]:
            boxes[name].append(box)
    for name, mine in boxes.items():
        shape = tensors[name].shape
        found = sum(math.prod(sizes) for _, sizes in mine)
        fault = ""
        if len(mine) > 1 and _overlap(mine):
            fault = "chunks of it overlap"
        elif found != math.prod(shape):
            fault = f"the processes have {found} of its {math.prod(shape)} elements"
        if fault:
            raise ValueError(
                f"tensor {name!r} of shape {list(shape)}: {fault}; under torch.distributed.checkpoint, tensors with"
                " _StridedShard need the planners of safetensors_torch.distributed"
            )


def _overlap(boxes: list[Box]) -> bool:
    # Sorted in the dimension with the most different offsets, few boxes are neighbours of each.
    if not boxes[0][0]:
        return True  # scalars
    along = max(range(len(boxes[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    open_boxes: list[Box] = []
    for offsets, sizes in sorted(boxes, key=lambda box: box[0][along]):
        open_boxes = [box for box in open_boxes if box[0][along] + box[1][along] > offsets[along]]
        for other_offsets, other_sizes in open_boxes:
            if all(
                begin < other_begin + other_size and other_begin < begin + size
                for begin, size, other_begin, other_size in zip(offsets, sizes, other_offsets, other_sizes, strict=True)
            ):
                return True
        open_boxes.append((offsets, sizes))
    return False
