"""One checkpoint that several processes save to a store: each file is uploaded by one of them.

Owns the division of the files into parts, their exchange, and the order in which the files appear. The other processes
send the writer of a file their elements in the order of its bytes, so that it never has more than a few batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from .._errors import call
from .._locations import RemotePath
from .._progress import Progress, ProgressBar
from .._remote import named
from .._save_checks import DisableTorchFunction
from .._upload import Upload, list_names
from ._chunks import Box, Chunk, assign
from ._group import Group
from ._joined import layout_arguments
from ._read_once import bytes_of, transport

# What one process sends in a step, at most, if it has all elements; and the limits of a batch of one file.
_STEP_BYTES = 64 << 20
_SMALLEST_BATCH, _LARGEST_BATCH = 1 << 20, 16 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of a process's chunk, which is a part of one batch. A scalar is a box of one element."""

    step: int
    sender: int
    writer: int
    # The number of the chunk, in the sender, and the box in it.
    chunk: int
    box: Box
    itemsize: int
    # Where it goes: the first byte, in the batch, of a box of such sizes, and the part's offsets in that.
    place: int
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.box[1]) * self.itemsize


@dataclass(slots=True)
class _NewFile:
    """A file, for the process that writes it."""

    name: str
    header: bytes
    # The bytes of each batch.
    batches: list[int]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(self.batches)


@dataclass(slots=True)
class RemotePlan:
    """What one process does in a save."""

    # In all processes: each step sends at most one batch to each writer.
    steps: int = 0
    files: list[_NewFile] = field(default_factory=list)
    sent: list[_Part] = field(default_factory=list)
    received: list[_Part] = field(default_factory=list)
    # The names of the files that have the process's chunks.
    file_of: list[str] = field(default_factory=list)


class RemoteLayout:
    """The files of a checkpoint, in the first process."""

    def __init__(
        self,
        directory: RemotePath,
        chunks: list[list[Chunk]],
        metadata: Mapping[str, str],
        max_shard_size: int,
        files: Mapping[str, int] | None = None,
    ) -> None:
        """Divides the chunks of all processes into files, and those into batches.

        Args:
            directory: for errors.
            chunks: those of each process.
            metadata: for each file.
            max_shard_size: as for save_sharded, in bytes.
            files: the number of each tensor's file, as for JoinedCheckpoint.

        Raises:
            ValueError: a tensor without a file; what assign raises.
            What save_sharded raises.
        """
        tensors, written = assign(chunks)
        native = torch.classes.safetensors_torch.CheckpointLayout
        arguments = layout_arguments(directory.title.encode(), tensors, metadata, max_shard_size, files)
        with _disable_current_modes(), DisableTorchFunction():
            self._native = call(native, *arguments)
        # The index is the last one, if there is one.
        self.names: list[str] = call(self._native.file_names)
        self.index: bytes = call(self._native.index).encode()
        self.plans = [RemotePlan() for _ in chunks]
        numbers = dict(zip(tensors, call(self._native.files), strict=True))
        for plan, held in zip(self.plans, chunks, strict=True):
            plan.file_of = [self.names[numbers[chunk.name]] for chunk in held]
        sources: dict[str, list[tuple[Box, int, int]]] = {name: [] for name in tensors}
        for rank, indices in enumerate(written):
            for index in indices:
                chunk = chunks[rank][index]
                if 0 not in chunk.sizes:
                    sources[chunk.name].append((_at_least_1d(chunk.box), rank, index))
        count = len(self.names) - bool(self.index)
        writers = min(len(chunks), count)
        limit = max(_SMALLEST_BATCH, min(_LARGEST_BATCH, _STEP_BYTES // writers))
        listed = list(tensors.values())
        steps = [0] * len(chunks)
        for number in range(count):
            ordered = [listed[index] for index in call(self._native.order, number)]
            header = bytes(call(self._native.header, number).tolist())
            self._add_file(
                number % len(chunks), _NewFile(self.names[number], header, []), ordered, sources, steps, limit
            )
        for plan in self.plans:
            plan.steps = max(steps)

    def _add_file(
        self,
        writer: int,
        file: _NewFile,
        tensors: Sequence[Chunk],
        sources: Mapping[str, list[tuple[Box, int, int]]],
        steps: list[int],
        limit: int,
    ) -> None:
        self.plans[writer].files.append(file)
        place = 0
        for tensor in tensors:
            shape, itemsize = tensor.shape or (1,), tensor.dtype.itemsize
            mine, first = sorted(sources[tensor.name]), 0
            for piece in _pieces(shape, max(limit // itemsize, 1)):
                nbytes = math.prod(piece[1]) * itemsize
                if place and place + nbytes > limit:
                    file.batches.append(place)
                    place = 0
                # Sorted by their first offsets, only a few can be in the piece.
                begin, end = piece[0][0], piece[0][0] + piece[1][0]
                while first < len(mine) and mine[first][0][0][0] + mine[first][0][1][0] <= begin:
                    first += 1
                for box, rank, chunk in mine[first:]:
                    if box[0][0] >= end:
                        break
                    both = _overlap(box, piece)
                    if both is not None:
                        inside, offsets = _relative(both, box[0]), _relative(both, piece[0])[0]
                        step = steps[writer] + len(file.batches)
                        part = _Part(step, rank, writer, chunk, inside, itemsize, place, piece[1], offsets)
                        self.plans[writer].received.append(part)
                        self.plans[rank].sent.append(part)
                place += nbytes
        file.batches.append(place)
        steps[writer] += len(file.batches)

    def stale(self, present: Sequence[str]) -> list[str]:
        """Returns those of the files of a directory that belong to an older checkpoint."""
        return call(self._native.stale, list(present))


def check_same_directory(titles: list[str | None]) -> None:
    """Checks that all processes save to one directory; a title is None if it is local.

    Raises:
        ValueError: they do not.
    """
    for rank, title in enumerate(titles):
        if title != titles[0]:
            first, other = (title or "a local directory" for title in (titles[0], title))
            raise ValueError(f"rank {rank} saves to {other}, and the first process to {first}; pass the same to all")


def _at_least_1d(box: Box) -> Box:
    return box if box[0] else ((0,), (1,))


def _pieces(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Yields boxes of at most ``limit`` elements which, one after the other, are a tensor in row-major order."""
    row = math.prod(shape[1:])
    if row == 0:
        return
    zeros = (0,) * (len(shape) - 1)
    rows = limit // row
    for begin in range(0, shape[0], max(rows, 1)):
        if rows:
            yield (begin, *zeros), (min(rows, shape[0] - begin), *shape[1:])
        else:
            for offsets, sizes in _pieces(shape[1:], limit):
                yield (begin, *offsets), (1, *sizes)


def _overlap(left: Box, right: Box) -> Box | None:
    """Returns the elements that are in both boxes, if there are some."""
    offsets, sizes = [], []
    for begin, size, other, other_size in zip(*left, *right, strict=True):
        offsets.append(max(begin, other))
        sizes.append(min(begin + size, other + other_size) - offsets[-1])
    return (tuple(offsets), tuple(sizes)) if min(sizes) > 0 else None


def _relative(box: Box, origin: tuple[int, ...]) -> Box:
    return tuple(offset - first for offset, first in zip(box[0], origin, strict=True)), box[1]


class RemoteSave:
    """The part of one process. Unless commit returns, abort must be called, which leaves the old checkpoint."""

    def __init__(self, directory: RemotePath) -> None:
        """Finds the client.

        Raises:
            ImportError, ValueError, TypeError: as store_of.
        """
        self._directory, self._store = directory, directory.store()
        # Complete files are kept until all processes have sent theirs.
        self._uploads: list[Upload] = []
        # New files that no checkpoint has yet: without them, the directory is as it was.
        self._new: list[str] = []
        self._present: Sequence[str] = ()

    def write(
        self,
        group: Group,
        plan: RemotePlan,
        chunks: Sequence[tuple[Chunk, torch.Tensor]],
        progress: Progress = None,
    ) -> None:
        """Sends this process's elements to the writers of their files, and uploads its own files.

        All processes must call it. After an error in one of them, the others return before the next step.

        Raises:
            OSError: the client has failed.
            What ``progress`` raises.
        """
        sent, received = _by_step(plan.sent), _by_step(plan.received)
        total = sum(file.nbytes for file in plan.files)
        batches = ((file, number) for file in plan.files for number in range(len(file.batches)))
        failure: BaseException | None = None
        done = 0
        with ProgressBar("save", progress is True) as bar, _disable_current_modes(), DisableTorchFunction():
            report = bar if progress is True else progress or None
            for step in range(plan.steps):
                messages: dict[int, torch.Tensor] = {}
                try:
                    if failure is None:
                        messages = _messages(group, sent.get(step, []), chunks)
                except BaseException as error:
                    failure = error
                # No process waits for the elements of one that has failed.
                if _is_true_in_any(group, failure is not None):
                    break
                arrived = _exchange(group, messages, received.get(step, []))
                try:
                    batch = next(batches, None)
                    if batch is not None:
                        done += self._append(*batch, received.get(step, []), arrived)
                        if report:
                            report(done, total)
                except BaseException as error:
                    failure = error
        if failure is not None:
            raise failure

    def _append(self, file: _NewFile, number: int, parts: list[_Part], arrived: dict[int, torch.Tensor]) -> int:
        """Uploads the next batch of a file; returns the number of bytes."""
        if number == 0:
            self._uploads.append(self._create(file.name, file.nbytes))
            self._uploads[-1].write(file.header)
        nbytes = file.batches[number]
        if nbytes:
            batch = bytearray(nbytes)  # the client may keep it until it is sent
            target = torch.frombuffer(batch, dtype=torch.uint8)
            read = dict.fromkeys(arrived, 0)
            for part in parts:
                begin = read[part.sender]
                read[part.sender] = begin + part.nbytes
                _place(part, arrived[part.sender][begin : begin + part.nbytes], target)
            self._uploads[-1].write(batch)
        return nbytes + (len(file.header) if number == 0 else 0)

    def _create(self, name: str, nbytes: int) -> Upload:
        return Upload(self._store, self._directory.join(name).title, nbytes)

    def _remove(self, name: str) -> None:
        title = self._directory.join(name).title
        named(title, lambda: self._store.remove(title))

    def commit(self, group: Group, plan: RemotePlan, layout: RemoteLayout | None) -> list[str]:
        """Makes the files appear, the index last, and removes those of the old checkpoint. Returns the names.

        All processes must call it.

        Args:
            group: the processes.
            plan: what this process has written.
            layout: in the first one.

        Raises:
            OSError: the client has failed. If the files replace others, the directory then has files of both
                checkpoints, and perhaps no index.
        """
        step = "committing a checkpoint"
        is_replaced = group.first(step, lambda: self._prepare(layout))
        group.each(step, lambda: self._commit_files(plan, is_replaced=is_replaced))
        # A client may fail after the server has put the index in place.
        self._new.clear()
        return group.first(step, lambda: self._finish(layout))

    def _prepare(self, layout: RemoteLayout | None) -> bool:
        """Returns whether files of an older checkpoint are replaced."""
        assert layout is not None  # the first process has it
        self._present = list_names(self._store, self._directory.title)
        files = layout.names[:-1] if layout.index else layout.names
        is_replaced = not set(files).isdisjoint(self._present)
        if is_replaced and layout.index and layout.names[-1] in self._present:
            # Nobody may read the new files by the old index.
            self._remove(layout.names[-1])
        return is_replaced

    def _commit_files(self, plan: RemotePlan, *, is_replaced: bool) -> None:
        for file in plan.files:
            self._uploads[0].commit()
            self._uploads.pop(0)
            if not is_replaced:
                self._new.append(file.name)

    def _finish(self, layout: RemoteLayout | None) -> list[str]:
        assert layout is not None  # the first process has it
        if layout.index:
            self._uploads.append(self._create(layout.names[-1], len(layout.index)))
            self._uploads[0].write(layout.index)
            self._uploads[0].commit()
            self._uploads.clear()
        # The old index before its files.
        for name in sorted(layout.stale(self._present), key=lambda name: not name.endswith(".json")):
            self._remove(name)
        return layout.names

    def abort(self) -> None:
        """Discards what is not committed."""
        while self._uploads:
            self._uploads.pop().abort()
        while self._new:
            # The error of the save is the one to report.
            with contextlib.suppress(Exception):
                self._remove(self._new.pop())


def _messages(
    group: Group, parts: list[_Part], chunks: Sequence[tuple[Chunk, torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """Returns the bytes of ``parts`` for each of their writers, where the group can send them."""
    pieces: dict[int, list[torch.Tensor]] = {}
    for part in parts:
        here = torch.device("cpu") if part.writer == group.rank else _sending_device(group)
        pieces.setdefault(part.writer, []).append(_elements(part, *chunks[part.chunk]).to(here))
    return {rank: torch.cat(mine) for rank, mine in pieces.items()}


def _sending_device(group: Group) -> torch.device:
    return transport(group.process_group, torch.device("cpu"))


def _exchange(group: Group, messages: dict[int, torch.Tensor], parts: list[_Part]) -> dict[int, torch.Tensor]:
    """Sends messages to other processes; returns the bytes that arrive from each, for ``parts``."""
    arrived = {rank: data for rank, data in messages.items() if rank == group.rank}
    if group.process_group is None:
        return arrived
    sizes: dict[int, int] = {}
    for part in parts:
        if part.sender != group.rank:
            sizes[part.sender] = sizes.get(part.sender, 0) + part.nbytes
    device = _sending_device(group)
    arriving = {rank: torch.empty(nbytes, dtype=torch.uint8, device=device) for rank, nbytes in sizes.items()}
    leaving = {rank: data for rank, data in messages.items() if rank != group.rank}
    operations = [
        dist.P2POp(function, data, dist.get_global_rank(group.process_group, rank), group.process_group)
        for function, each in ((dist.irecv, arriving), (dist.isend, leaving))
        for rank, data in sorted(each.items())
    ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return arrived | {rank: data.cpu() for rank, data in arriving.items()}


def _by_step(parts: list[_Part]) -> dict[int, list[_Part]]:
    steps: dict[int, list[_Part]] = {}
    for part in parts:
        steps.setdefault(part.step, []).append(part)
    return steps


def _elements(part: _Part, chunk: Chunk, tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a part, row-major."""
    view = tensor.reshape(1) if tensor.dim() == 0 else tensor
    for dim, (begin, size) in enumerate(zip(*part.box, strict=True)):
        view = view.narrow(dim, begin, size)
    return bytes_of(view.to(chunk.dtype).resolve_conj().resolve_neg())


def _place(part: _Part, data: torch.Tensor, batch: torch.Tensor) -> None:
    """Copies the bytes of a part to their places."""

    def in_bytes(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return *sizes[:-1], sizes[-1] * part.itemsize

    shape = in_bytes(part.sizes)
    target = batch[part.place : part.place + math.prod(shape)].view(shape)
    for dim, (begin, size) in enumerate(zip(in_bytes(part.offsets), in_bytes(part.box[1]), strict=True)):
        target = target.narrow(dim, begin, size)
    target.copy_(data.view(in_bytes(part.box[1])))


def _is_true_in_any(group: Group, value: bool) -> bool:
    """Returns whether a value is true in one of the processes."""
    if group.process_group is None:
        return value
    flag = torch.tensor([int(value)], device=_sending_device(group))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group.process_group)
    return bool(flag.item())
