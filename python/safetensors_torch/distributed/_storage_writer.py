"""HuggingFaceStorageWriter: torch.distributed.checkpoint writes safetensors files, final ones directly.

Owns the translation between the plans of torch.distributed.checkpoint and chunks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .._arguments import Dtype, Path, check_bool, check_dtype, check_metadata
from .._locations import RemotePath
from .._remote import named
from .._save import save_file
from .._sharded import parse_size
from ._chunks import Chunk, check_boxes
from ._group import Group
from ._joined import HiddenFiles, JoinedCheckpoint, new_first_number, no_file, write_chunks
from ._location import StorageLocation
from ._names import (
    OFFSETS_KEY,
    POSITIONS_KEY,
    SHAPE_KEY,
    SHARDED_DIRECTORY,
    VERSION,
    VERSION_KEY,
    chunk_file_name,
    is_chunk_file_name,
)
from ._planners import refuse_strided
from ._remote_save import RemoteLayout, RemotePlan, RemoteSave, check_same_directory
from ._torch_names import torch_class

_LAYOUTS = ("auto", "final", "shards")

_OTHER_LAYOUT = (
    "the planner has cached the plan of a save with another layout; save with a planner that does not cache, or whose"
    " class no other save uses"
)

# Divides nothing: torch's writer has one file unless it gets a mapping.
_NO_LIMIT = (1 << 63) - 1


@dataclasses.dataclass(frozen=True)
class _FinalPlan:
    """What a plan carries to each process: the names of the hidden files follow from it, in this save and in later
    ones.

    Cached plans of torch.distributed.checkpoint bring the one of an earlier save.
    """

    first_number: int
    process: int


@dataclasses.dataclass(frozen=True)
class _UploadPlan:
    """What a plan carries to each process that uploads files: whether others take part."""

    processes: int


_Base = torch_class("HuggingFaceStorageWriter", FileSystemWriter)


class HuggingFaceStorageWriter(StorageLocation, _Base):  # type: ignore[misc]
    """A storage writer of torch.distributed.checkpoint for safetensors files, with the parameters of torch's.

    With the layout "final", all processes write their parts to their places in one set of files. There is no
    consolidation, and an old checkpoint stays until all have succeeded. The files are those that save_file writes for
    the whole tensors: any shape and dtype, tensors that share memory or are not contiguous included.

    With the layout "shards", each process writes files of its own, with torch's names and metadata, for
    consolidate or HuggingFaceStorageReader.

    Args:
        path: the directory, which all processes share; or a URL, as for load_file.
        fqn_to_index_mapping: the number of each tensor's file, from 1 on. Final files are numbered without gaps: a
            number without a tensor is left out.
        thread_count: accepted for torch's sake; the threads are chosen as for save_file.
        save_distributed: whether several processes save.
        enable_consolidation: whether the files in ``path`` are the final ones, if several processes save.
        thread_count_consolidation: accepted for torch's sake; nothing is consolidated.
        max_shard_size: the most bytes of tensors in one final file, as for save_sharded, instead of a mapping; by
            default there is one file.
        metadata: text to store in the header of each file. ``format`` = ``pt`` is added.
        dtype: the dtype in the file of floating-point tensors; each keeps its own by default.
        durable: whether a save returns only after all files are on the disk, as for save_file.
        process_group: the processes that save, which torch.distributed.checkpoint.save must get too; a save of others
            is refused. By default, nothing is checked for local directories, and all processes save to others.
        layout: "final", "shards", or "auto": "shards" if ``save_distributed`` and not ``enable_consolidation``, as
            torch's writer, otherwise "final".
        filesystem: what ``path``, or a ``checkpoint_id``, is in, as for load_file.

    A save raises:
        TypeError: a value that is not a tensor, by name.
        ValueError: chunks that overlap or leave a gap, as those of _StridedShard under torch's own planner do.
        OSError: a file cannot be written, or a process does not see the directory of the first one.
        ImportError: a URL without its client.
        torch.distributed.checkpoint raises CheckpointException with them, in all processes.

    Example:
        >>> writer = HuggingFaceStorageWriter(directory, save_distributed=True, enable_consolidation=True)
        >>> dcp.save(model.state_dict(), storage_writer=writer)
    """

    def __init__(
        self,
        path: Path,
        fqn_to_index_mapping: Mapping[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
        *,
        max_shard_size: int | str | None = None,
        metadata: dict[str, str] | None = None,
        dtype: Dtype = None,
        durable: bool = False,
        process_group: Any = None,
        layout: str = "auto",
        filesystem: Any = None,
    ) -> None:
        if layout not in _LAYOUTS:
            raise ValueError(f"layout is {layout!r}; give one of {', '.join(map(repr, _LAYOUTS))}")
        if fqn_to_index_mapping is not None and max_shard_size is not None:
            raise ValueError("give fqn_to_index_mapping or max_shard_size, not both")
        check_metadata(metadata)
        self._filesystem = filesystem
        self._init_location(FileSystemWriter, path, filesystem, thread_count=thread_count)
        self.fqn_to_index_mapping = None if fqn_to_index_mapping is None else dict(fqn_to_index_mapping)
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.consolidated_output_path = str(self.path) if enable_consolidation else None
        self.thread_count_consolidation = thread_count_consolidation
        self._max_shard_size = _NO_LIMIT if max_shard_size is None else parse_size(max_shard_size)
        self._metadata = dict(metadata or {})
        self._dtype = check_dtype(dtype)
        self._durable = check_bool(durable, "durable")
        shards = layout == "shards" or (layout == "auto" and save_distributed and not enable_consolidation)
        self._is_final = not shards
        self._process_group = process_group
        if shards and enable_consolidation:
            self._descend()
        self._checkpoint: JoinedCheckpoint | None = None

    def __getstate__(self) -> dict[str, Any]:
        # To a process that saves in the background, before it begins.
        return {**self.__dict__, "_checkpoint": None, "_process_group": None}

    def _descend(self) -> None:
        """Continues in the subdirectory for the files of each process."""
        if self._location is None:
            self.path = self.fs.concat_path(self.path, SHARDED_DIRECTORY)
        else:
            self._set_location(self._location.join(SHARDED_DIRECTORY))

    def _cancel(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.cancel()
        self._checkpoint = None

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self._cancel()
        super().reset(checkpoint_id)
        if checkpoint_id and self.enable_consolidation:
            self.consolidated_output_path = str(self.path)
            if not self._is_final:
                self._descend()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self._is_final:
            if not getattr(self, "use_collectives", True):
                raise ValueError('layout="final" needs a plan of all processes: save with use_collectives=True')
            return plan
        if self._location is None:
            os.makedirs(self.path, exist_ok=True)
        return plan if getattr(self, "use_collectives", True) else self._with_rank(plan, (self.rank or 0) + 1)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        expected = len(plans) if self._process_group is None else Group(self._process_group).size
        if len(plans) != expected:
            raise ValueError(
                f"{len(plans)} processes save, but process_group has {expected}; pass the same process_group to the"
                " writer and to torch.distributed.checkpoint.save"
            )
        if not self._is_final:
            return [self._with_rank(plan, number) for number, plan in enumerate(plans, 1)]
        if self._location is not None:
            return self._plan_upload(plans)
        self._cancel()
        final, complete = _complete_plans(plans)
        tensors = self._tensors_of(complete)
        # Also without a tensor: an old checkpoint is replaced by an empty one.
        files = self._files_of(tensors)
        self._checkpoint = JoinedCheckpoint(
            self.path,
            tensors,
            self._metadata,
            max_shard_size=self._max_shard_size,
            files=files,
            first_number=final.first_number,
            durable=self._durable,
        )
        return [dataclasses.replace(plan, storage_data=final) for plan in plans]

    def _files_of(self, names: Iterable[str]) -> dict[str, int] | None:
        """Returns the number of each tensor's file, unless their size divides them."""
        if self.fqn_to_index_mapping is None and self._max_shard_size == _NO_LIMIT:
            return dict.fromkeys(names, 1)
        return self.fqn_to_index_mapping

    def _plan_upload(self, plans: list[SavePlan]) -> list[SavePlan]:
        # write_data makes the plan of the parts: cached plans of torch.distributed.checkpoint arrive empty here.
        if all(_is_usable(plan) for plan in plans):
            self._tensors_of(plans)
        members = len(plans) if len(plans) == 1 else Group(self._process_group).size
        if len(plans) != members:
            raise ValueError(
                f"{len(plans)} processes save, but {members} are in the group in which they would send their parts for"
                f" {self._location!r}; pass process_group to the writer too"
            )
        return [dataclasses.replace(plan, storage_data=_UploadPlan(len(plans))) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        if self._is_final and self._location is not None:
            future.set_result(self._upload_final(self._location, plan, planner))
            return future
        try:
            refuse_strided(planner)
            results = self._write_final(plan, planner) if self._is_final else self._write_shards(plan, planner)
        except BaseException:
            # The first process does not learn about it before the next save, or before it is dropped.
            self._cancel()
            if isinstance(plan.storage_data, _FinalPlan):
                _remove_hidden(self.path, plan.storage_data)
            raise
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        if not self._is_final:
            self._commit_shards(results)
            return
        checkpoint, self._checkpoint = self._checkpoint, None
        if self._location is not None:
            return  # no process ends its uploads in this step, so write_data has
        if checkpoint is not None:
            checkpoint.commit()
        elif not self.save_distributed and _Base is not FileSystemWriter:
            # Another object has written the files: torch writes the index of its results.
            super().finish(metadata, results)

    @staticmethod
    def _with_rank(plan: SavePlan, number: int) -> SavePlan:
        return dataclasses.replace(plan, storage_data={"shard_index": number})

    def _tensors_of(self, plans: list[SavePlan]) -> dict[str, Chunk]:
        items = [item for plan in plans for item in plan.items]
        chunks = [self._chunk_of(item) for item in items]
        tensors: dict[str, Chunk] = {}
        for chunk in chunks:
            first = tensors.setdefault(chunk.name, chunk)
            if (first.dtype, first.shape) != (chunk.dtype, chunk.shape):
                raise ValueError(
                    f"tensor {chunk.name!r}: processes have {first.dtype} of shape {list(first.shape)} and"
                    f" {chunk.dtype} of shape {list(chunk.shape)}; save tensors that are the same everywhere"
                )
        check_boxes(tensors, ((chunk.name, chunk.box) for chunk in chunks))
        return tensors

    def _chunk_of(self, item: WriteItem) -> Chunk:
        data = item.tensor_data
        if item.type == WriteItemType.BYTE_IO or data is None:
            raise TypeError(
                f"{item.index.fqn!r} is not a tensor: safetensors files contain tensors only; leave it out, or save it"
                " in the metadata as text"
            )
        dtype = data.properties.dtype
        if self._dtype is not None and dtype.is_floating_point:
            dtype = self._dtype
        return Chunk(item.index.fqn, dtype, tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes))

    def _write_final(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        if not plan.items:
            return []
        if not isinstance(plan.storage_data, _FinalPlan):
            if Group().size > 1:
                raise ValueError(_OTHER_LAYOUT)
            # The caller has made a plan by itself, for this process alone.
            plan = self.prepare_global_plan([plan])[0]
        hidden = _find_hidden(self.path, plan.storage_data)
        chunks = [(self._chunk_of(item), planner.resolve_data(item).detach()) for item in plan.items]
        write_chunks(self.path, hidden, chunks, start=os.getpid() % len(hidden.names), durable=self._durable)
        names = [
            f"model-{number + 1:05d}-of-{len(hidden.names):05d}.safetensors" for number in range(len(hidden.names))
        ]
        return [
            WriteResult(item.index, chunk.nbytes, _StorageInfo(names[hidden.file_of[chunk.name]], 0, chunk.nbytes))
            for item, (chunk, _) in zip(plan.items, chunks, strict=True)
        ]

    def _upload_final(self, location: RemotePath, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        """Uploads the final files, in all processes together."""
        storage_data = plan.storage_data
        is_alone = isinstance(storage_data, _UploadPlan) and storage_data.processes == 1
        group = Group(None if is_alone else self._process_group, is_alone=is_alone)
        chunks: list[tuple[Chunk, torch.Tensor]] = []
        remote: RemoteSave | None = None
        layout: RemoteLayout | None = None

        def describe() -> tuple[str, list[Chunk]]:
            nonlocal remote
            # In all processes, or none: the others wait for this one.
            if group.size > 1 and storage_data != _UploadPlan(group.size):
                raise ValueError(_OTHER_LAYOUT)
            refuse_strided(planner)
            remote = RemoteSave(location)
            chunks.extend((self._chunk_of(item), planner.resolve_data(item).detach()) for item in plan.items)
            return location.title, [chunk for chunk, _ in chunks]

        def divide(found: list[tuple[str, list[Chunk]]]) -> list[RemotePlan]:
            nonlocal layout
            check_same_directory([title for title, _ in found])
            held = [mine for _, mine in found]
            files = self._files_of(chunk.name for mine in held for chunk in mine)
            layout = RemoteLayout(location, held, self._metadata, self._max_shard_size, files)
            return layout.plans

        try:
            mine = group.plan("planning a save", describe, divide)
            assert remote is not None  # `describe` has made it
            group.each("writing a checkpoint", lambda: remote.write(group, mine, chunks))
            remote.commit(group, mine, layout)
        except BaseException:
            if remote is not None:
                remote.abort()
            raise
        return [
            WriteResult(item.index, chunk.nbytes, _StorageInfo(name, 0, chunk.nbytes))
            for item, (chunk, _), name in zip(plan.items, chunks, mine.file_of, strict=True)
        ]

    def _write_shards(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        if not isinstance(plan.storage_data, dict) or "shard_index" not in plan.storage_data:
            raise ValueError(_OTHER_LAYOUT)
        rank = plan.storage_data["shard_index"]
        mapping = self.fqn_to_index_mapping
        files: dict[int, dict[str, tuple[WriteItem, Chunk]]] = {}
        highest = max(mapping.values()) if mapping else 1
        for item in plan.items:
            chunk = self._chunk_of(item)
            if mapping is not None and chunk.name not in mapping:
                raise no_file(chunk.name)
            number = 1 if mapping is None else mapping[chunk.name]
            # A file has one tensor of each name; further chunks of it go into files behind the others.
            while chunk.name in files.get(number, {}):
                number = max(number, highest) + 1
            files.setdefault(number, {})[chunk.name] = (item, chunk)
        count = max([highest, *files])
        results = []
        for number, members in sorted(files.items()):
            name = chunk_file_name(rank, number, count)
            positions = {
                fqn: {OFFSETS_KEY: list(chunk.offsets), SHAPE_KEY: list(chunk.shape)}
                for fqn, (_, chunk) in members.items()
            }
            metadata = {POSITIONS_KEY: json.dumps(positions), VERSION_KEY: VERSION, "format": "pt", **self._metadata}
            tensors = {}
            storages: set[int] = set()
            for fqn, (item, chunk) in members.items():
                tensor = planner.resolve_data(item).detach().to(chunk.dtype)
                # save_file refuses tensors that share memory, because loading would not share it again.
                shares = tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in storages
                tensors[fqn] = tensor.clone() if shares else tensor
                storages.add(tensor.untyped_storage().data_ptr())
                results.append(WriteResult(item.index, chunk.nbytes, _StorageInfo(name, 0, chunk.nbytes)))
            path = os.path.join(self.path, _hidden(name)) if self._location is None else self._location.join(name)
            save_file(tensors, path, metadata, force_contiguous=True, durable=self._durable)
        return results

    def _commit_shards(self, results: list[list[WriteResult]]) -> None:
        """Gives the files of all processes their names, and removes those of an earlier save."""
        names = {result.storage_data.relative_path for mine in results for result in mine}
        if self._location is not None:
            # They have their names: a store has no renames.
            self._remove_other_shards(self._location, names)
            return
        for name in sorted(names):
            os.replace(os.path.join(self.path, _hidden(name)), os.path.join(self.path, name))
        if getattr(self, "use_collectives", True):
            for name in os.listdir(self.path):
                if name not in names and is_chunk_file_name(name):
                    os.remove(os.path.join(self.path, name))
        if self._durable:
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _remove_other_shards(self, location: RemotePath, names: set[str]) -> None:
        if not getattr(self, "use_collectives", True):
            return
        store = location.store()
        for name in named(location.title, lambda: store.list(location.title)) or ():
            if name not in names and is_chunk_file_name(name):
                title = location.join(name).title
                named(title, lambda title=title: store.remove(title))


# The complete plans of the last saves of this process, for cached plans: those that have not changed arrive empty.
_last_plans: dict[_FinalPlan, list[SavePlan]] = {}


def _complete_plans(plans: list[SavePlan]) -> tuple[_FinalPlan, list[SavePlan]]:
    """Returns what determines the hidden names, and the plans with the cached ones filled in."""
    if all(_is_usable(plan) for plan in plans):
        final = _FinalPlan(new_first_number(), os.getpid())
        complete = plans
    else:
        # A process whose plan has not changed uses its cached plan, and the names in that. This one has its own.
        fitting = [final for final in _cached_finals() if len(_last_plans.get(final, ())) == len(plans)]
        if not fitting:
            raise ValueError(
                "the planner has cached the plans of a save that this process does not know; save once with"
                " enable_plan_caching=False"
            )
        final = fitting[-1]
        cached = _last_plans[final]
        complete = [new if _is_usable(new) else old for new, old in zip(plans, cached, strict=True)]
    keep = {*_cached_finals(), final}
    _last_plans[final] = complete
    for other in [other for other in _last_plans if other not in keep]:
        del _last_plans[other]
    return final, complete


def _cached_finals() -> list[_FinalPlan]:
    """Returns what the cached plans of this process say, those of the last save at the end."""
    plans = getattr(SavePlanner, "_cached_final_save_plan", {}).values()
    return [plan.storage_data for plan in plans if isinstance(plan.storage_data, _FinalPlan)]


def _hidden(name: str) -> str:
    """Returns the name of a chunk file until all processes have written theirs; a later save overwrites it."""
    return f".{name}.tmp"


def _is_usable(plan: SavePlan) -> bool:
    return getattr(plan, "usable", True)


def _hidden_names(directory: Path, final: _FinalPlan) -> list[str]:
    """Returns the names of the hidden files of a save, in the order of their numbers."""
    prefix, suffix = f".safetensors-{final.process}-", ".tmp"
    found: list[tuple[int, str]] = []
    for name in os.listdir(directory):
        number = name[len(prefix) : -len(suffix)]
        if name.startswith(prefix) and name.endswith(suffix) and number.isdecimal():
            if 0 <= int(number) - final.first_number < 1 << 20:
                found.append((int(number), name))
    return [name for _, name in sorted(found)]


def _find_hidden(directory: Path, final: _FinalPlan) -> HiddenFiles:
    """Returns the hidden files of a save, from the names and headers in ``directory``."""
    from .._safe_open import safe_open

    names = _hidden_names(directory, final)
    if not names:
        raise FileNotFoundError(
            f"{os.fspath(directory)}: no file of this save: another process has failed or ended, or the first one has"
            " another view of this directory; save to a directory that all processes share"
        )
    file_of = {}
    for number, name in enumerate(names):
        with safe_open(os.path.join(directory, name), "pt", backend="pread") as file:
            file_of.update(dict.fromkeys(file.keys(), number))
    return HiddenFiles(names, file_of)


def _remove_hidden(directory: Path, final: _FinalPlan) -> None:
    """Removes the hidden files of a save that has failed in this process."""
    # The error of this process is the one to report.
    with contextlib.suppress(OSError):
        for name in _hidden_names(directory, final):
            os.remove(os.path.join(directory, name))
