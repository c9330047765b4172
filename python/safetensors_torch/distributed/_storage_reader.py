"""HuggingFaceStorageReader: torch.distributed.checkpoint reads safetensors files, each process its bytes alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from .._arguments import Path
from .._locations import RemotePath
from .._safe_open import safe_open
from ._group import Group
from ._location import StorageLocation
from ._planners import refuse_strided
from ._read_once import Part, check_read_once, replica_group, share
from ._stored import Request, StoredTensors
from ._torch_names import storage_info, torch_class


class HuggingFaceStorageReader(StorageLocation, torch_class("HuggingFaceStorageReader", FileSystemReader)):  # type: ignore[misc]
    """A storage reader of torch.distributed.checkpoint for safetensors files, with the parameters of torch's.

    Reads final files, by their index if there is one, or the files of each process, with torch's names and metadata. If
    a directory has both, the final ones count. Each process reads the bytes that it needs, all with one call, directly
    into the tensors' memory.

    Args:
        path: a directory, an index or a file; or a URL of these, as for load_file.
        thread_count: accepted for torch's sake; the threads are chosen as for load_file.
        process_group: the processes that load, if elements that several of them hold are to be read once. Not with
            no_dist=True.
        read_once: as for load_into, if there is a process group.
        filesystem: what ``path``, or a ``checkpoint_id``, is in, as for load_file.

    A load raises:
        SafetensorError: no checkpoint, an invalid file, chunks that overlap or leave a gap.
        OSError: a file is missing or cannot be read.
        ValueError: a DTensor with _StridedShard under torch's own planner, by name.

    Example:
        >>> dcp.load(state_dict, storage_reader=HuggingFaceStorageReader(directory))
    """

    def __init__(
        self,
        path: Path,
        thread_count: int = 1,
        *,
        process_group: Any = None,
        read_once: Any = "auto",
        filesystem: Any = None,
    ) -> None:
        self._init_location(FileSystemReader, path, filesystem)
        self.thread_count = thread_count
        self._process_group = process_group
        self._read_once = check_read_once(read_once)
        self._stored: StoredTensors | None = None
        self._failure: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stored": None, "_process_group": None}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self._stored = None
        super().reset(checkpoint_id)

    def _open(self) -> StoredTensors:
        if self._stored is None:
            self._stored = StoredTensors(self._location or self.path)
        return self._stored

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._failure is not None and "rank" in kwargs:
            # torch.distributed.checkpoint drops the error of the first call, and asks for metadata of this process
            # alone: set_up_storage_reader raises it again.
            return Metadata(state_dict_metadata={})
        self._stored = self._failure = None
        try:
            return self._read_metadata()
        except Exception as error:
            self._failure = error
            raise

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def _read_metadata(self) -> Metadata:
        state_dict_metadata = {}
        storage_data = {}
        for name, stored in self._open().tensors.items():
            chunks = []
            for (offsets, sizes), path in stored.chunks:
                chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
                index = MetadataIndex(fqn=name, offset=torch.Size(offsets))
                storage_data[index] = storage_info(path, torch.Size(sizes), stored.dtype)
            state_dict_metadata[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=stored.dtype), size=torch.Size(stored.shape), chunks=chunks
            )
        metadata = Metadata(state_dict_metadata=state_dict_metadata, storage_data=storage_data)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items: list[ReadItem] = []
        requests: list[Request] = []
        # By the path to open: the tensors that torch's own code reads.
        others: dict[str | RemotePath, list[ReadItem]] = {}

        def prepare() -> None:
            refuse_strided(planner)
            tensors = self._open().tensors
            for item in plan.items:
                name = item.storage_index.fqn
                chunks = tensors[name].chunks
                # The index of a chunk takes as long to look up as a small tensor to read.
                path = chunks[0][1] if len(chunks) == 1 else self.storage_data[item.storage_index].relative_path
                if self._is_converted(item):
                    # A scale may be in another file, which torch's code finds in a local directory alone.
                    others.setdefault(self._location or path, []).append(item)
                    continue
                target = planner.resolve_tensor(item)
                if target.requires_grad:
                    target = target.detach()
                if target.size() != item.lengths:
                    raise ValueError(
                        f"tensor {name!r}: the planner asks for {list(item.lengths)} elements, and"
                        f" gives a target of shape {list(target.size())}"
                    )
                requests.append((path, name, item.storage_offsets, target))
                items.append(item)

        try:
            # Views of parameters would record operations otherwise, which takes twice as long.
            with torch.no_grad():
                if self._process_group is None:
                    prepare()
                    self._open().read(requests)
                else:
                    group = Group(self._process_group)
                    group.each("planning a load", prepare)
                    share(group, self._read_once, self._parts(planner, items, requests), self._open())
            for item, request in zip(items, requests, strict=True):
                planner.commit_tensor(item, request[3])
            for path, converted in others.items():
                with safe_open(path, framework="pt") as file:
                    for item in converted:
                        self._process_read_request(file, item, planner)
        finally:
            if self._stored is not None:
                self._stored.close()
            self._stored = None
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _parts(self, planner: LoadPlanner, items: list[ReadItem], requests: list[Request]) -> list[Part]:
        tensors = getattr(planner, "state_dict", None) or {}
        parts = []
        for item, request in zip(items, requests, strict=True):
            box = tuple(item.storage_index.offset or ()) + tuple(item.storage_offsets), tuple(item.lengths)
            group = replica_group(tensors.get(item.dest_index.fqn), self._process_group)
            parts.append(Part(item.storage_index.fqn, box, request[3], [request], group))
        return parts

    def _is_converted(self, item: ReadItem) -> bool:
        return False


_Quantized = torch_class("QuantizedHuggingFaceStorageReader", FileSystemReader)


class QuantizedHuggingFaceStorageReader(
    *(() if _Quantized is FileSystemReader else (_Quantized,)),  # type: ignore[misc]
    HuggingFaceStorageReader,
):
    """As HuggingFaceStorageReader, for checkpoints with quantized weights, which torch's own code dequantizes.

    Needs torch 2.9 or later, and an index.

    Args:
        path: a directory with an index; or a URL of one, as for load_file.
        thread_count: accepted for torch's sake.
        target_dtype: the dtype of the dequantized tensors.
        block_size: the rows and columns that share a scale.
        process_group, read_once, filesystem: as for HuggingFaceStorageReader.

    Raises:
        RuntimeError: this torch has no such reader.
    """

    def __init__(
        self,
        path: Path,
        thread_count: int = 1,
        target_dtype: torch.dtype = torch.float32,
        block_size: int = 128,
        *,
        process_group: Any = None,
        read_once: Any = "auto",
        filesystem: Any = None,
    ) -> None:
        if not hasattr(self, "_is_tensor_quantized"):
            raise RuntimeError(
                "QuantizedHuggingFaceStorageReader needs torch 2.9 or later; use HuggingFaceStorageReader"
            )
        options = {"process_group": process_group, "read_once": read_once, "filesystem": filesystem}
        HuggingFaceStorageReader.__init__(self, path, thread_count, **options)
        self.target_dtype = target_dtype
        self.block_size = block_size
        self._weight_scale_mapping: dict[str, str] = {}
        self._weight_map: dict[str, str] = {}
        self._tensor_full_shapes: dict[str, torch.Size] = {}

    def _load_quantization_metadata(self) -> None:
        if self._location is None:
            super()._load_quantization_metadata()
        else:
            # As if all tensors were in one file: that with which torch's code is called has them all.
            self._build_weight_scale_mapping(dict.fromkeys(self._open().tensors, ""))

    def _is_converted(self, item: ReadItem) -> bool:
        return self._is_tensor_quantized(item.storage_index.fqn)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if kwargs:
            return HuggingFaceStorageReader.read_metadata(self, *args, **kwargs)
        # torch's, which calls that of HuggingFaceStorageReader.
        metadata = super().read_metadata()
        # torch corrects the sizes of tensors that have another shape in the file, but not those of their chunks.
        for name, stored in metadata.state_dict_metadata.items():
            chunk = stored.chunks[0]
            if len(chunk.sizes) != len(stored.size):
                offsets = torch.Size([0] * len(stored.size))
                place = metadata.storage_data.pop(MetadataIndex(name, chunk.offsets))
                metadata.storage_data[MetadataIndex(name, offsets)] = place
                stored.chunks = [ChunkStorageMetadata(offsets=offsets, sizes=stored.size)]
        return metadata
