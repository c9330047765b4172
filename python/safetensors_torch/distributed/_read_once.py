"""Elements that several processes need, read by one of them and sent to the others.

Owns the choice of the process that reads each part, and the order of the broadcasts. Reading comes
first, in all processes: a broadcast begins only once all have succeeded.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from .._progress import Progress
from ._chunks import Box
from ._group import Group
from ._stored import Request, StoredTensors

READ_ONCE = ("auto", False, "node", "world")

# Smaller parts are sent together: a broadcast has a latency.
_BATCH_BYTES = 1 << 20


def check_read_once(value: Any) -> Any:
    """Returns ``value`` if it is one of READ_ONCE.

    Raises:
        ValueError: it is not.
    """
    if not any(value is known or (known is not False and value == known) for known in READ_ONCE):
        raise ValueError(f"read_once is {value!r}; give one of {', '.join(map(repr, READ_ONCE))}")
    return value


@dataclass(slots=True)
class Part:
    """A box of a tensor that this process needs, and the tensor to fill with it."""

    name: str
    box: Box
    target: torch.Tensor
    # How to read it from files, for StoredTensors.read.
    requests: list[Request]
    # The processes that need it; None if this one alone reads it.
    process_group: Any = None

    @property
    def key(self) -> Hashable:
        return self.name, self.box, str(self.target.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.box[1]) * self.target.element_size()


def share(
    group: Group,
    read_once: Any,
    parts: Sequence[Part],
    stored: StoredTensors,
    progress: Progress = None,
) -> None:
    """Fills the targets of ``parts``. Parts with a group are read by one of its processes, if that pays.

    Every process of ``group`` must call it. The parts of one process group must be the same in its processes, in the
    same order.

    Args:
        group: the processes that load.
        read_once: "auto" means "world" on a network filesystem, else False.
        parts: what this process needs.
        stored: the files.
        progress: as for StoredTensors.read.

    Raises:
        ValueError: processes of one group need different parts.
        What StoredTensors.read raises; RuntimeError if it failed in another process.
    """
    groups = {id(part.process_group): part.process_group for part in parts if part.process_group is not None}
    members = {key: tuple(dist.get_process_group_ranks(one)) for key, one in groups.items()}

    def describe() -> tuple[str, int, bool, dict[tuple[int, ...], list[Hashable]]]:
        needs: dict[tuple[int, ...], list[Hashable]] = {}
        for part in parts:
            if part.process_group is not None:
                needs.setdefault(members[id(part.process_group)], []).append(part.key)
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return socket.gethostname(), rank, stored.is_remote(), needs

    def plan(found: list[Any]) -> list[set[tuple[int, ...]]]:
        hosts = {rank: host for host, rank, _, _ in found}
        needs_of = {rank: mine for _, rank, _, mine in found}
        if not (read_once in ("world", "node") or (read_once == "auto" and any(remote for _, _, remote, _ in found))):
            return [set()] * len(found)
        shared = set()
        for ranks, keys in {ranks: keys for mine in needs_of.values() for ranks, keys in mine.items()}.items():
            if len(ranks) < 2 or not needs_of.keys() >= set(ranks):
                continue  # a process outside of the group of this load does not take part
            if read_once == "node" and len({hosts[rank] for rank in ranks}) > 1:
                continue
            for rank in ranks:
                if needs_of[rank].get(ranks) != keys:
                    raise ValueError(
                        f"rank {rank} needs other elements than the processes that it shares a group with"
                        f" {list(ranks)}; load the same tensors in all, or pass read_once=False"
                    )
            shared.add(ranks)
        return [shared] * len(found)

    shared = group.plan("planning a load", describe, plan)
    own = []
    # For each group, what each of its processes reads for the others: the one with the fewest bytes takes the next
    # part.
    queues = {key: [_Queue() for _ in ranks] for key, ranks in members.items() if ranks in shared}
    for part in parts:
        mine = queues.get(id(part.process_group))
        if mine is None:
            own.append(part)
            continue
        queue = min(mine, key=lambda queue: queue.nbytes)
        queue.parts.append(part)
        queue.nbytes += part.nbytes
        if members[id(part.process_group)][mine.index(queue)] == dist.get_rank():
            own.append(part)
    requests = [request for part in own for request in part.requests]
    group.each("loading a checkpoint", lambda: stored.read(requests, progress))
    # In one order: processes may meet several groups in different ones.
    for key, mine in sorted(queues.items(), key=lambda entry: members[entry[0]]):
        for rank, queue in zip(members[key], mine, strict=True):
            for batch in _batches([part for part in queue.parts if part.nbytes > 0]):
                _broadcast(groups[key], rank, batch)


@dataclass(eq=False, slots=True)
class _Queue:
    """The parts that one process reads for its group."""

    parts: list[Part] = field(default_factory=list)
    nbytes: int = 0


def _batches(parts: list[Part]) -> list[list[Part]]:
    batches: list[list[Part]] = []
    nbytes = _BATCH_BYTES
    for part in parts:
        device = part.target.device
        if nbytes >= _BATCH_BYTES or batches[-1][-1].target.device != device:
            batches.append([])
            nbytes = 0
        batches[-1].append(part)
        nbytes += part.nbytes
    return batches


def _broadcast(process_group: Any, reader: int, batch: list[Part]) -> None:
    targets = [part.target for part in batch]
    sends = transport(process_group, targets[0].device)
    if len(targets) == 1 and targets[0].is_contiguous() and targets[0].device == sends:
        dist.broadcast(bytes_of(targets[0]), src=reader, group=process_group)
        return
    if dist.get_rank() == reader:
        message = torch.cat([bytes_of(target).to(sends) for target in targets])
        dist.broadcast(message, src=reader, group=process_group)
        return
    message = torch.empty(sum(part.nbytes for part in batch), dtype=torch.uint8, device=sends)
    dist.broadcast(message, src=reader, group=process_group)
    begin = 0
    for part in batch:
        data = message[begin : begin + part.nbytes].clone()
        begin += part.nbytes
        part.target.copy_(data.view(part.target.dtype).reshape(part.target.shape))


def replica_group(value: Any, default: Any) -> Any:
    """Returns the processes that hold the same elements of a tensor as this one; None if no other does.

    Of a DTensor that is replicated in several dimensions of its mesh, those of the largest.
    """
    if not isinstance(value, DTensor):
        return default
    mesh = value.device_mesh
    sizes = [
        (mesh.size(dim), -dim) for dim, placement in enumerate(value.placements) if isinstance(placement, Replicate)
    ]
    if not sizes or max(sizes)[0] < 2:
        return None
    return mesh.get_group(-max(sizes)[1])


def transport(process_group: Any, device: torch.device) -> torch.device:
    """Returns the device between which a group sends: that of the tensors if its backend can, else another one."""
    entries = (entry.partition(":") for entry in str(dist.get_backend_config(process_group)).split(","))
    backends = {kind: backend for kind, _, backend in entries}
    # gloo copies tensors of other devices through the host anyway.
    if device.type in backends and (device.type == "cpu" or backends[device.type] != "gloo"):
        return device
    return torch.device("cpu" if "cpu" in backends else next(iter(backends)))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the elements of a tensor as bytes, row-major: of its own memory if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
