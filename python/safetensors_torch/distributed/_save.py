"""save: one checkpoint from the tensors of many processes, without gathering them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._arguments import Dtype, Path, check_bool, check_dtype, check_metadata, encode_path
from .._keywords import explains_keywords
from .._locations import RemotePath, located
from .._progress import Progress, check_progress
from .._sharded import parse_size
from ._chunks import Chunk, assign, local_chunks
from ._group import Group
from ._joined import HiddenFiles, JoinedCheckpoint, write_chunks
from ._remote_save import RemoteLayout, RemotePlan, RemoteSave, check_same_directory


@explains_keywords
def save(
    state_dict: Mapping[str, torch.Tensor],
    directory: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_size: int | str = "5GB",
    dtype: Dtype = None,
    durable: bool = False,
    process_group: Any = None,
    progress: Progress = None,
    filesystem: Any = None,
) -> list[str]:
    """Saves the tensors of all processes of a group as one checkpoint, as save_sharded would save the whole tensors.

    Every process of the group must call it. Each writes the elements that it holds to their places in the final files,
    from the tensors' own memory: nothing is gathered, and nothing is written twice. If several processes hold the same
    elements, one of them writes them. The old checkpoint stays until all have succeeded.

    Args:
        state_dict: tensors by name. A DTensor is saved as the whole tensor; any other tensor must be the same in all
            processes that have its name, but not all processes need to have it (pipeline stages). They may share
            memory, and need not be contiguous; then they are copied, one at a time.
        directory: a directory that all processes share, created if it is missing; str, bytes or os.PathLike. Or a URL,
            as for load_file: then each file is uploaded by one process, to which the others send their elements.
        metadata: text to store in the header of each file, that of the first process. ``format`` = ``pt`` is added.
        max_shard_size: the most bytes of tensors in one file, as for save_sharded.
        dtype: the dtype in the file of floating-point tensors; each keeps its own by default. The converted parts of
            one file need memory.
        durable: whether to return only after all files are on the disk, as for save_file.
        process_group: the processes that save; all by default. Without an initialized torch.distributed, this one
            alone.
        progress: as for save_file; each process counts its own bytes.
        filesystem: what ``directory`` is in, as for load_file.

    Returns:
        The names of the files, the index last, in every process.

    Raises:
        TypeError: a value that is not a tensor, or an argument of another type.
        ValueError: a DTensor that is ``Partial``; processes that have different dtypes or shapes of a tensor.
        RuntimeError: another process has failed; the error names it. The directory is then as it was.
        OSError: a file cannot be written, or this process cannot see the directory of the first one.
        SafetensorError, UnicodeEncodeError, ImportError: as save_sharded.

    Example:
        >>> save(model.state_dict(), "checkpoints/step-1000")  # on every rank
        ['model.safetensors']
    """
    work = _Save(state_dict, directory, metadata, max_shard_size, dtype, durable, progress, filesystem)
    group = Group(process_group)
    try:
        planned = group.plan("planning a save", work.describe, work.plan)
        if isinstance(planned, RemotePlan):
            return work.upload(group, planned)
        hidden, written = planned
        start = group.rank * len(hidden.names) // group.size
        group.each("writing a checkpoint", lambda: work.write(hidden, written, start))
        return group.first("committing a checkpoint", work.commit)
    except BaseException:
        work.cancel()
        raise


class _Save:
    """The part of one process. It checks the arguments where the others learn about an error."""

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor],
        directory: Path,
        metadata: Mapping[str, str] | None,
        max_shard_size: int | str,
        dtype: Dtype,
        durable: bool,
        progress: Progress,
        filesystem: Any,
    ) -> None:
        self._state_dict = state_dict
        self._directory = directory
        self._metadata = metadata
        self._max_shard_size = max_shard_size
        self._dtype = dtype
        self._durable = durable
        self._progress = progress
        self._filesystem = filesystem
        self._chunks: list[tuple[Chunk, torch.Tensor]] = []
        self._checkpoint: JoinedCheckpoint | None = None
        self._layout: RemoteLayout | None = None
        self._remote: RemoteSave | None = None

    def describe(self) -> tuple[str | None, list[Chunk]]:
        """Returns where this process saves to, if it is not a local directory, and what it has."""
        check_bool(self._durable, "durable")
        check_progress(self._progress)
        check_metadata(self._metadata)
        self._directory = located(self._directory, self._filesystem)
        if isinstance(self._directory, RemotePath):
            self._remote = RemoteSave(self._directory)
        else:
            encode_path(self._directory)
        parse_size(self._max_shard_size)
        self._chunks = local_chunks(self._state_dict, check_dtype(self._dtype))
        title = self._directory.title if isinstance(self._directory, RemotePath) else None
        return title, [chunk for chunk, _ in self._chunks]

    def plan(self, found: list[tuple[str | None, list[Chunk]]]) -> list[Any]:
        check_same_directory([title for title, _ in found])
        chunks, size = [held for _, held in found], parse_size(self._max_shard_size)
        metadata = self._metadata or {}
        if isinstance(self._directory, RemotePath):
            self._layout = RemoteLayout(self._directory, chunks, metadata, size)
            return self._layout.plans
        tensors, written = assign(chunks)
        checkpoint = JoinedCheckpoint(self._directory, tensors, metadata, max_shard_size=size, durable=self._durable)
        self._checkpoint = checkpoint
        return [(checkpoint.hidden, indices) for indices in written]

    def upload(self, group: Group, plan: RemotePlan) -> list[str]:
        remote = self._remote
        assert remote is not None  # of a URL
        group.each("writing a checkpoint", lambda: remote.write(group, plan, self._chunks, self._progress))
        return remote.commit(group, plan, self._layout)

    def write(self, hidden: HiddenFiles, written: list[int], start: int) -> None:
        mine = [self._chunks[index] for index in written]
        write_chunks(self._directory, hidden, mine, start=start, durable=self._durable, progress=self._progress)

    def commit(self) -> list[str]:
        assert self._checkpoint is not None  # only the first process commits, and it has planned
        return self._checkpoint.commit()

    def cancel(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.cancel()
        if self._remote is not None:
            self._remote.abort()
