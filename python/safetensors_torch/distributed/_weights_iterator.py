"""weights_iterator: the tensors of checkpoint files for serving engines, read once for a group of processes.

Owns the choice of the process that reads each tensor, and the order. The prefetch loader reads.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .._arguments import Device, Path, title_of, to_device
from .._errors import SafetensorError, call, names_instead, short_repr
from .._iterate import open_paths, select_of_files
from .._keywords import explains_keywords
from .._load import Names
from .._locations import located
from .._prefetch_loader import landed, parse_plan, start
from .._progress import STEP_SECONDS, Progress, ProgressBar, check_progress
from .._sharded import parse_size
from ._group import Group
from ._read_once import bytes_of, check_read_once, transport

_BUFFER = "256MiB"
_MOST_THREADS = 64

# Tensors below this are sent together: a broadcast of gloo or NCCL has a latency.
_SMALL_BYTES = 1 << 20

# A batch ends when it has this many bytes; each is read and sent by one process.
_BATCH_BYTES = 16 << 20


@explains_keywords
def weights_iterator(
    files: Path | Iterable[Path],
    device: Device = "cpu",
    process_group: Any = None,
    *,
    names: Names = None,
    slices: Mapping[str, Any] | None = None,
    read_once: Any = "auto",
    buffer_bytes: int | str | None = None,
    progress: Progress = None,
    filesystem: Any = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of one file or several, each with memory of its own, while the next ones are read.

    Without a process group, or with ``read_once=False``, each process reads for itself. If torch.distributed is
    initialized and the files are on a network filesystem, each process then begins with another file, so that they do
    not all ask for the same bytes at once: the order of the files differs between processes.

    With a group, and "node" or "world", the processes read together: each reads some of the tensors and sends them to
    the others. All of them get all tensors in the same order. Every process of the group must call it, with the same
    arguments except ``device`` and ``progress``, and take all tensors. A process that stops early lets the others wait
    until the time-out of the group.

    Args:
        files: a path or a URL, or several of them. Each is a file, an index or a directory, as for safe_open.
        device: the device of the tensors, as for load_file.
        process_group: the processes that read together.
        names: the tensors to read, as for iterate.
        slices: what to read of some tensors, as in a plan of safe_open.prefetch; the others are read whole.
        read_once: "world": the group reads each byte once. "node": the processes of each host name do. "auto": "world"
            if there is a group and the files are on a network filesystem, else False.
        buffer_bytes: the most bytes that this process reads ahead, as for iterate; 256 MiB by default.
        progress: as for iterate.
        filesystem: what ``files`` are in, as for load_file.

    Raises:
        RuntimeError: another process has failed; the error names it.
        ValueError: another ``read_once``, or one that needs a process group.
        SafetensorError, OSError, MemoryError, torch.OutOfMemoryError, TypeError, ImportError: as iterate.

    Example:
        >>> for name, tensor in weights_iterator(paths, "cuda", process_group=tensor_parallel_group):
        ...     model.load_weight(name, tensor)
    """
    check_read_once(read_once)
    if process_group is None and read_once in ("node", "world"):
        raise ValueError(f"read_once={read_once!r} needs a process_group: the processes that read together")
    work = _Work(files, device, names, slices, buffer_bytes, progress, filesystem)
    if process_group is None or read_once is False or dist.get_world_size(process_group) == 1:
        work.check()
        tensors = work.alone()
    else:
        tensors = work.together(Group(process_group), process_group, read_once)
    next(tensors)  # opens the files, and starts to read
    return tensors


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor to read: the number of its file, its name, and what it is in memory."""

    file: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _Work:
    def __init__(
        self,
        files: Path | Iterable[Path],
        device: Device,
        names: Names,
        slices: Mapping[str, Any] | None,
        buffer_bytes: int | str | None,
        progress: Progress,
        filesystem: Any,
    ) -> None:
        self._files = files
        self._filesystem = filesystem
        self._wanted_device = device
        self._names = names
        self._slices = slices or {}
        self._wanted_bytes = buffer_bytes
        self._progress = progress

    def check(self) -> None:
        """Checks the arguments; of processes that read together, where the others learn about an error."""
        files = self._files
        given = [files] if isinstance(files, (str, bytes, os.PathLike)) else list(files)
        self._paths: Sequence[Any] = [located(path, self._filesystem) for path in given]
        self._device = to_device(self._wanted_device)
        self._slices = dict(self._slices)
        self._buffer_bytes = parse_size(_BUFFER if self._wanted_bytes is None else self._wanted_bytes)
        check_progress(self._progress)

    def alone(self) -> Iterator[Any]:
        """Yields None once the files are open, then names and tensors."""
        opened = open_paths(list(self._paths), "mmap")
        if dist.is_available() and dist.is_initialized() and any(call(file.is_remote) for file in opened):
            first = dist.get_rank() * len(opened) // dist.get_world_size()
            opened = opened[first:] + opened[:first]
            self._paths = [*self._paths[first:], *self._paths[:first]]
        plans = self._plans(opened)
        indices: dict[str, Any] = {}
        for _, _, some in plans:
            indices.update(some)
        native = start(
            opened,
            [names for names, _, _ in plans],
            [ranges for _, ranges, _ in plans],
            self._device,
            None,
            self._buffer_bytes,
            _MOST_THREADS,
        )
        try:
            yield None
            with ProgressBar("load", self._progress is True) as bar:
                report = bar if self._progress is True else self._progress or None
                for name, tensor in landed(native, report):
                    yield name, _indexed(tensor, indices.get(name))
                    del tensor  # while the next one is awaited, only the caller keeps it
        finally:
            call(native.close)

    def _plans(self, opened: list[Any]) -> list[tuple[list[str] | None, list[list[int]], dict[str, Any]]]:
        """Returns for each file the names to read, their ranges, and the indices that complete the slices."""
        chosen = select_of_files(opened, self._names, self._title())
        unknown = set(self._slices)
        plans = []
        for file, names in zip(opened, chosen, strict=True):
            mine = call(file.offset_keys) if names is None else names
            sliced = {name: self._slices[name] for name in mine if name in self._slices}
            unknown -= sliced.keys()
            if not sliced:
                plans.append((names, [], {}))
                continue
            plans.append(parse_plan(file, {name: sliced.get(name) for name in mine}, lambda name: None))
        if unknown:
            name = min(unknown)
            known = [one for file in opened for one in call(file.keys)]
            raise SafetensorError(
                f"{self._title()}: slices has {short_repr(name)}, and no tensor to read is called so;"
                f" {names_instead(name, known)}"
            )
        return plans

    def _title(self) -> str:
        return ", ".join(title_of(path) for path in self._paths[:3])

    def together(self, group: Group, process_group: Any, read_once: Any) -> Iterator[Any]:
        """As alone, for all processes of a group."""
        opened: list[Any] = []

        def describe() -> tuple[str, bool]:
            self.check()
            opened.extend(open_paths(list(self._paths), "mmap"))
            return socket.gethostname(), any(call(file.is_remote) for file in opened)

        def plan(descriptions: list[tuple[str, bool]]) -> list[tuple[list[list[int]], list[list[_Item]] | None]]:
            hosts = [host for host, _ in descriptions]
            if read_once == "auto" and not any(remote for _, remote in descriptions):
                return [([], None)] * group.size
            by_host: dict[str, list[int]] = {}
            for rank, host in enumerate(hosts):
                by_host.setdefault(host if read_once == "node" else "", []).append(rank)
            return [(list(by_host.values()), self._batches(opened))] * group.size

        readers, batches = group.plan("planning a load", describe, plan)
        if batches is None:
            yield from self.alone()
            return
        mine: Any = None
        for ranks in readers:
            members = [dist.get_global_rank(process_group, rank) for rank in ranks]
            if group.rank in ranks:
                one = process_group
                if len(readers) > 1:
                    # Processes outside of `process_group` do not call this.
                    one = dist.new_group(members, use_local_synchronization=True)
                mine = _Readers(one, members, ranks.index(group.rank))
        yield None
        yield from self._exchange(opened, batches, mine)

    def _batches(self, opened: list[Any]) -> list[list[_Item]]:
        batches: list[list[_Item]] = [[]]
        nbytes = 0
        for number, (file, (names, _, _)) in enumerate(zip(opened, self._plans(opened), strict=True)):
            chosen = call(file.offset_keys) if names is None else names
            for name, like in zip(chosen, call(file.get_tensors, chosen, torch.device("meta")), strict=True):
                part = like if self._slices.get(name) is None else like[self._slices[name]]
                if nbytes >= _BATCH_BYTES:
                    batches.append([])
                    nbytes = 0
                batches[-1].append(_Item(number, name, part.dtype, tuple(part.shape)))
                nbytes += batches[-1][-1].nbytes
        return batches

    def _exchange(self, opened: list[Any], batches: list[list[_Item]], readers: _Readers) -> Iterator[Any]:
        own = [item for number, batch in enumerate(batches) if number % readers.size == readers.rank for item in batch]
        total, done = sum(item.nbytes for batch in batches for item in batch), 0
        source = self._read(opened, own)
        try:
            with ProgressBar("load", self._progress is True) as bar:
                report = bar if self._progress is True else self._progress or None
                for number, batch in enumerate(batches):
                    reader = number % readers.size
                    failure, held = None, None
                    if reader == readers.rank:
                        try:
                            held = [next(source) for _ in batch]
                        except Exception as error:
                            failure = error
                    for item, tensor in zip(
                        batch, readers.send(reader, batch, held, failure, self._device), strict=True
                    ):
                        yield item.name, tensor
                        done += item.nbytes
                        del tensor
                    if report:
                        report(done, total)
        finally:
            source.close()

    def _read(self, opened: list[Any], items: list[_Item]) -> Any:
        """Yields the tensors of ``items``, file by file, in their order."""
        for number in dict.fromkeys(item.file for item in items):
            names = [item.name for item in items if item.file == number]
            plan = {name: self._slices.get(name) for name in names}
            if any(entry is not None for entry in plan.values()):
                chosen, ranges, indices = parse_plan(opened[number], plan, lambda name: None)
            else:
                chosen, ranges, indices = names, [], {}
            native = start([opened[number]], [chosen], [ranges], self._device, None, self._buffer_bytes, _MOST_THREADS)
            try:
                for name in names:
                    while (tensor := call(native.take, name, STEP_SECONDS)) is None:
                        pass
                    yield _indexed(tensor, indices.get(name))
                    del tensor
            finally:
                call(native.close)


def _indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    return tensor if index is None else tensor[index].clone()


class _Readers:
    """The processes that read each byte once."""

    def __init__(self, process_group: Any, members: list[int], rank: int) -> None:
        self._group = process_group
        self._members = members
        self.rank = rank

    @property
    def size(self) -> int:
        return len(self._members)

    def send(
        self,
        reader: int,
        batch: list[_Item],
        held: list[torch.Tensor] | None,
        failure: Exception | None,
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Sends the tensors of a batch from one process to the others, and returns them.

        The first message says whether that process has them: it never enters the others after an error of its own.
        """
        sends = transport(self._group, device)
        small = [item for item in batch if item.nbytes < _SMALL_BYTES]
        message = torch.zeros(1 + sum(item.nbytes for item in small), dtype=torch.uint8, device=sends)
        if failure is not None:
            message[0] = 1
        elif held is not None:
            parts = [bytes_of(one) for item, one in zip(batch, held, strict=True) if item.nbytes < _SMALL_BYTES]
            message = torch.cat([message[:1], *(part.to(sends) for part in parts)])
        self._broadcast(message, reader)
        if message[0].item() != 0:
            text = [None if failure is None else f"{type(failure).__name__}: {failure}"]
            dist.broadcast_object_list(text, src=self._members[reader], group=self._group)
            if failure is not None:
                raise failure
            raise RuntimeError(f"rank {self._members[reader]} could not read its part: {text[0]}")
        if held is not None:
            for item, tensor in zip(batch, held, strict=True):
                if item.nbytes >= _SMALL_BYTES:
                    self._broadcast(bytes_of(tensor).to(sends), reader)
            return held
        received = []
        offset = 1
        for item in batch:
            if item.nbytes < _SMALL_BYTES:
                data = message[offset : offset + item.nbytes].clone()
                offset += item.nbytes
            else:
                data = torch.empty(item.nbytes, dtype=torch.uint8, device=sends)
                self._broadcast(data, reader)
            received.append(data.view(item.dtype).reshape(item.shape).to(device))
        return received

    def _broadcast(self, data: torch.Tensor, reader: int) -> None:
        if data.numel() > 0:
            dist.broadcast(data, src=self._members[reader], group=self._group)
