"""load_into and load_dtensors: each process reads the elements that it holds, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from .._arguments import Path
from .._errors import short_repr
from .._keywords import explains_keywords
from .._locations import located
from .._progress import Progress, check_progress
from ._chunks import local_chunks
from ._group import Group
from ._local_ranges import local_ranges
from ._read_once import Part, check_read_once, replica_group, share
from ._stored import StoredTensors


@explains_keywords
def load_into(
    target: Mapping[str, torch.Tensor] | nn.Module,
    path: Path,
    *,
    strict: bool = True,
    read_once: Any = "auto",
    process_group: Any = None,
    progress: Progress = None,
    filesystem: Any = None,
) -> tuple[list[str], list[str]]:
    """Loads a checkpoint into tensors that exist: DTensors and others, on any device, with any strides.

    Every process of the group must call it. Each reads the elements that it holds, directly into their memory, whatever
    number of processes has saved them. All names and shapes are checked before the first element changes.

    Args:
        target: tensors by name, or a module, whose state dict counts.
        path: a directory, an index or a file, as for load_sharded; or the directory of the files that the processes of
            torch.distributed.checkpoint have written. Or a URL of these, as for load_file.
        strict: whether names that are only in the target or only in the checkpoint are an error.
        read_once: whether elements that several processes hold are read by one of them and sent to the others:
            "world" among all, "node" if those processes have the same host name, False never. "auto" means "world" for
            URLs and on network filesystems, else False. A tensor that is not a DTensor must then be in the target of
            every process.
        process_group: the processes that load; all by default. Without an initialized torch.distributed, this one
            alone.
        progress: as for load_file; each process counts its own bytes.
        filesystem: what ``path`` is in, as for load_file.

    Returns:
        The names that are only in the target, and those that are only in the checkpoint. Names of the target that share
        their memory with a loaded one are not missing.

    Raises:
        RuntimeError: names that differ, if ``strict``; or another process has failed: the error names it.
        ValueError: shapes that differ; a DTensor that is ``Partial``; a sparse, nested or expanded tensor.
        SafetensorError: no checkpoint, an invalid file, chunks that overlap or leave a gap.
        TypeError, OSError, ImportError: as load_file.

    Example:
        >>> load_into(model, "checkpoints/step-1000")  # on every rank
        ([], [])
    """
    work = _Load(target, path, strict, read_once, Group(process_group), progress, filesystem)
    work.run()
    return work.missing, work.unexpected


class _Load:
    """The part of one process."""

    def __init__(
        self,
        target: Mapping[str, Any] | nn.Module,
        path: Path,
        strict: bool,
        read_once: Any,
        group: Group,
        progress: Progress,
        filesystem: Any,
        stored: StoredTensors | None = None,
    ) -> None:
        self._target = target
        self._path = path
        self._strict = strict
        self._read_once = read_once
        self._group = group
        self._progress = progress
        self._filesystem = filesystem
        # The checkpoint at `path`, if it is open already.
        self._stored = stored
        self._parts: list[Part] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = []

    def run(self) -> None:
        try:
            self._group.each("checking a checkpoint", self._check)
            assert self._stored is not None  # `_check` has opened it
            share(self._group, self._read_once, self._parts, self._stored, self._progress)
        finally:
            if self._stored is not None:
                self._stored.close()

    def _check(self) -> None:
        check_progress(self._progress)
        check_read_once(self._read_once)
        self._path = located(self._path, self._filesystem)
        if self._stored is None:
            self._stored = StoredTensors(self._path)
        stored = self._stored
        tensors = self._target.state_dict() if isinstance(self._target, nn.Module) else self._target
        loaded = {name: value for name, value in tensors.items() if name in stored.tensors}
        chunks = local_chunks(loaded)
        for chunk, view in chunks:
            _check_target(chunk.name, view)
        memory = {_memory_of(value) for value in loaded.values()}
        self.missing = sorted(
            name
            for name, value in tensors.items()
            if name not in loaded and not (isinstance(value, torch.Tensor) and _memory_of(value) in memory)
        )
        self.unexpected = sorted(stored.tensors.keys() - tensors.keys())
        if self._strict and (self.missing or self.unexpected):
            raise RuntimeError(
                f"the target and {short_repr(self._path)} have different tensors; missing in the checkpoint:"
                f" {_listed(self.missing)}; unexpected: {_listed(self.unexpected)}; pass strict=False to load the"
                " others"
            )
        for name, value in loaded.items():
            if tuple(value.shape) != stored.tensors[name].shape:
                raise ValueError(
                    f"tensor {name!r} has shape {list(stored.tensors[name].shape)} in {short_repr(self._path)}, and"
                    f" {list(value.shape)} in the target; load into a tensor of its shape"
                )
        for chunk, view in chunks:
            if 0 in chunk.sizes:
                continue
            requests = stored.read_box(chunk.name, chunk.box, view)
            group = replica_group(loaded[chunk.name], self._group.process_group)
            self._parts.append(Part(chunk.name, chunk.box, view, requests, group))


def _check_target(name: str, view: torch.Tensor) -> None:
    """Checks what would be an error of torch's, without the name."""
    if view.numel() == 0 or view.is_meta:
        return
    spans = [(size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True)]
    if view.untyped_storage().nbytes() < (view.storage_offset() + sum(spans) + 1) * view.itemsize:
        raise RuntimeError(
            f"tensor {name!r}: its memory was freed or shrunk, as FSDP does with sharded parameters; load into the"
            " shards, or resize the storage first"
        )
    if any(size > 1 and span == 0 for size, span in zip(view.shape, spans, strict=True)):
        raise ValueError(f"tensor {name!r} is expanded: elements of it share their memory; clone it first")


def _memory_of(tensor: torch.Tensor) -> Any:
    """Returns a key that tied tensors share."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel() == 0 or local.is_meta:
        return id(tensor)
    return local.device, local.data_ptr(), tuple(local.shape), local.stride()


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:20])) or "none"
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


@explains_keywords
def load_dtensors(
    path: Path,
    device_mesh: Any,
    placements: Mapping[str, Sequence[Any]] | Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    read_once: Any = "auto",
    process_group: Any = None,
    progress: Progress = None,
    filesystem: Any = None,
) -> dict[str, DTensor]:
    """Loads a checkpoint as new DTensors. Each process reads the elements that its placements give it.

    Args:
        path: as for load_into.
        device_mesh: a DeviceMesh; the tensors are on its device.
        placements: those of all tensors, or a dict of those of some names; others are replicated. A tensor that lacks
            the dimension to shard is replicated.
        names: the tensors to load; all by default.
        dtype: the dtype of floating-point tensors; each keeps its own by default.
        read_once: as for load_into.
        process_group: the processes that load, as for load_into.
        progress: as for load_file.
        filesystem: as for load_into.

    Returns:
        The DTensors by name, in the order of the checkpoint.

    Raises:
        KeyError: a name that the checkpoint does not have.
        What load_into raises.

    Example:
        >>> load_dtensors(directory, init_device_mesh("cpu", (4,)), [Shard(0)])
    """
    group = Group(process_group)
    result: dict[str, DTensor] = {}
    stored_tensors: StoredTensors | None = None

    def make() -> None:
        nonlocal stored_tensors
        location = located(path, filesystem)
        stored_tensors = StoredTensors(location)
        tensors = stored_tensors.tensors
        for name in tensors if names is None else names:
            if name not in tensors:
                raise KeyError(f"{short_repr(location)} has no tensor {name!r}")
            stored = tensors[name]
            wanted = placements.get(name, ()) if isinstance(placements, Mapping) else placements
            dims = len(stored.shape)
            mine = [Replicate() if hasattr(one, "dim") and not -dims <= one.dim < dims else one for one in wanted]
            mine += [Replicate()] * (device_mesh.ndim - len(mine))
            convert = dtype is not None and stored.dtype.is_floating_point
            like = torch.empty(stored.shape, dtype=dtype if convert else stored.dtype, device="meta")
            result[name] = _empty(like, device_mesh, mine)

    group.each("planning DTensors", make)
    _Load(result, path, names is None, read_once, group, progress, filesystem, stored_tensors).run()
    return result


def _empty(like: torch.Tensor, device_mesh: Any, placements: Sequence[Any]) -> DTensor:
    """Returns a DTensor of the shape and dtype of a tensor, without values."""
    coordinate = device_mesh.get_coordinate()
    shape = [0] * like.dim()
    if coordinate is not None:
        ranges = local_ranges(like.shape, device_mesh.shape, coordinate, placements)
        shape = [sum(end - begin for begin, end in dim) for dim in ranges]
    local = torch.empty(shape, dtype=like.dtype, device=device_mesh.device_type)
    return DTensor.from_local(local, device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
