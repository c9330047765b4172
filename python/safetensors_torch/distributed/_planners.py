"""SavePlanner and LoadPlanner: the default planners of torch.distributed.checkpoint, with _StridedShard.

torch's own describe the elements of a process by one box. A _StridedShard can have several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from ._chunks import Box, local_chunks


class _Boxes:
    """A DTensor as the boxes that this process holds; what torch.distributed.checkpoint asks of a tensor of its own."""

    def __init__(self, name: str, tensor: DTensor) -> None:
        self._tensor = tensor
        chunks = local_chunks({name: tensor})
        self._views: dict[tuple[int, ...], tuple[Box, torch.Tensor]] = {
            chunk.offsets: (chunk.box, view) for chunk, view in chunks if 0 not in chunk.sizes or 0 in chunk.shape
        }

    def size(self) -> torch.Size:
        return self._tensor.size()

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._tensor.to_local())
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)),
                    properties=properties,
                    size=self._tensor.size(),
                ),
            )
            for offsets, ((_, sizes), _) in self._views.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, ((_, sizes), _) in self._views.items()
        ]

    def view(self, index: MetadataIndex) -> torch.Tensor:
        offsets = tuple(index.offset) if index.offset is not None else None
        if offsets is None or offsets not in self._views:
            raise ValueError(f"tensor {index.fqn!r}: this process holds no chunk at {offsets}")
        return self._views[offsets][1]


def _is_strided(value: Any) -> bool:
    return isinstance(value, DTensor) and any(isinstance(placement, _StridedShard) for placement in value.placements)


def _with_boxes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _Boxes(name, value) if _is_strided(value) else value for name, value in state_dict.items()}


class SavePlanner(DefaultSavePlanner):
    """torch's DefaultSavePlanner; a DTensor with _StridedShard is saved box by box."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.state_dict = _with_boxes(self.state_dict)

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict.get(index.fqn)
        return value.view(index) if isinstance(value, _Boxes) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """torch's DefaultLoadPlanner; a DTensor with _StridedShard is loaded box by box."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict = _with_boxes(self.state_dict)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        value = self.state_dict.get(index.fqn)
        return value.view(index) if isinstance(value, _Boxes) else super().lookup_tensor(index)


def refuse_strided(planner: Any) -> None:
    """Refuses a planner that has other boxes of a DTensor than those that this process holds.

    Raises:
        ValueError: it has such a tensor, by name.
    """
    for name, value in (getattr(planner, "state_dict", None) or {}).items():
        if _is_strided(value) and not _is_one_box(name, value):
            raise ValueError(
                f"tensor {name!r} has placements {value.placements}, which torch's own planner gets wrong; pass"
                " SavePlanner() or LoadPlanner() of safetensors_torch.distributed as planner"
            )


def _is_one_box(name: str, tensor: DTensor) -> bool:
    """Returns whether torch's own planner has the right box."""
    if tensor.device_mesh.get_coordinate() is None:
        return True
    held = [chunk.box for chunk, _ in local_chunks({name: tensor}) if 0 not in chunk.sizes]
    try:
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    except Exception:
        return False
    return held == [(tuple(offsets), tuple(sizes))] or (not held and 0 in sizes)
