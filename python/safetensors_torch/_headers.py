"""Reads headers, edits metadata and copies tensors through the core's C library, without importing torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from ctypes import byref, c_int32, c_void_p
from typing import Any, NamedTuple

from ._c_library import (
    CChange,
    CEditOptions,
    CLoadPlan,
    CStr,
    c_library,
    c_str,
    count_of,
    open_files,
    tensor_infos,
)
from ._exceptions import SafetensorError
from ._locations import RemotePath

_UNKNOWN = 2**64 - 1


class TensorInfo(NamedTuple):
    """A tensor's entry in a header."""

    name: str
    dtype: str
    shape: list[int]
    nbytes: int
    file: str
    """The path of its file, relative to the directory of the checkpoint."""
    begin: int
    """The offset of its bytes in the file."""


class Headers(NamedTuple):
    """The headers of a checkpoint of one or several files."""

    files: list[str]
    metadata: dict[str, str] | None
    tensors: list[TensorInfo]
    """File after file, in the order of their data."""


LOAD_TARGETS = ("mmap", "pread", "device")
"""Where loads put tensors, in the order of the numbers of sft_load_target."""


class LoadPlan(NamedTuple):
    """How a load would read a file."""

    readers: int
    """The number of threads that read; 0 if pages are read when they are touched."""
    request: int | None
    """The most bytes of one read; None without a limit."""
    direct: bool
    """Whether reads bypass the page cache."""
    reason: str


class FilePlans(NamedTuple):
    """How loads would read a file."""

    path: str
    nbytes: int
    filesystem: str
    cached: int | None
    """How many bytes are in the page cache; None if that is unknown."""
    plans: list[LoadPlan]
    """One for each of LOAD_TARGETS."""


def read_headers(path: str | bytes | RemotePath) -> Headers:
    """Reads the headers of the checkpoint at ``path``: a file, an index, or a directory with either.

    Raises:
        SafetensorError: a file is not valid safetensors, or does not fit the index.
        OSError: a file cannot be read, or the package lacks the C library.
    """
    library, headers = c_library(), Headers([], None, [])
    with open_files(library, path) as shards:
        for name, file in shards:
            headers.files.append(name)
            for info in tensor_infos(library, file):
                dtype = library.sft_dtype_get_code(info.dtype).decode()
                shape = info.shape[: info.rank]
                headers.tensors.append(TensorInfo(info.name.text(), dtype, shape, info.nbytes, name, info.begin))
            metadata = _metadata(library, file)
            if metadata is not None:
                # The first file that has a key counts, as for safe_open.
                headers = headers._replace(metadata={**metadata, **(headers.metadata or {})})
    return headers


def explain_loads(path: str) -> list[FilePlans]:
    """Returns how loads of the checkpoint at ``path`` would read each of its files now.

    Raises:
        SafetensorError: a file is not valid safetensors, or does not fit the index.
        OSError: a file cannot be read, or the package lacks the C library.
    """
    library, files = c_library(), []
    is_file = not os.path.isdir(path) and not path.endswith(".json")
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    with open_files(library, path) as shards:
        for name, file in shards:
            plan, plans = CLoadPlan(struct_size=ctypes.sizeof(CLoadPlan)), []
            for target in range(len(LOAD_TARGETS)):
                library.sft_file_explain_load(file, target, byref(plan))
                plans.append(
                    LoadPlan(plan.readers, plan.request_bytes or None, bool(plan.direct), plan.reason.decode())
                )
            cached = None if plan.cached_bytes == _UNKNOWN else plan.cached_bytes
            full = path if is_file else os.path.join(directory, name)
            files.append(FilePlans(full, os.path.getsize(full), plan.filesystem.decode(), cached, plans))
    return files


def edit_metadata(path: str, changes: Mapping[str, str | None], in_place: bool) -> None:
    """Changes the metadata of one file, as safetensors_torch.edit_metadata does; None removes a key."""
    texts = [(key.encode(), None if value is None else value.encode()) for key, value in changes.items()]
    array = (CChange * len(texts))(*[CChange(c_str(key), c_str(value)) for key, value in texts])
    options = CEditOptions(struct_size=ctypes.sizeof(CEditOptions), in_place=in_place)
    c_library().sft_edit_metadata(os.fsencode(path), array, len(array), byref(options))


def copy_tensors(
    path: str,
    names: Mapping[str, str],
    metadata: Mapping[str, str] | None,
    target: str,
    report_progress: Callable[[int, int], None],
) -> None:
    """Writes tensors of the checkpoint at ``path`` into the file ``target``, which is replaced once it is complete.

    Args:
        path: a file, an index, or a directory with either.
        names: the name of each tensor, and its name in ``target``.
        metadata: the metadata of ``target``.
        target: the path of the file; it may be the one that is read.
        report_progress: called with the bytes done and the total, after each tensor.

    Raises:
        SafetensorError: a file is not valid safetensors, or a new name is reserved or occurs twice.
        OSError: a file cannot be read or written.
    """
    library, writer, incremental = c_library(), c_void_p(), c_void_p()
    library.sft_writer_new(byref(writer))
    try:
        with open_files(library, path) as shards:
            tensors = []
            for _, file in shards:
                for index, info in enumerate(tensor_infos(library, file)):
                    if (old := info.name.text()) in names:
                        name, data = names[old].encode(), c_void_p()
                        library.sft_writer_declare_tensor(writer, name, len(name), info.dtype, info.shape, info.rank)
                        library.sft_file_get_data(file, index, byref(data))
                        tensors.append((name, data, info.nbytes))
            if len(tensors) != len(names):
                raise SafetensorError(f"{path}: lacks {len(names) - len(tensors)} of the tensors to copy; list it")
            if metadata is not None:
                library.sft_writer_enable_metadata(writer)
            for entry in (metadata or {}).items():
                key, value = map(str.encode, entry)
                library.sft_writer_add_metadata(writer, key, len(key), value, len(value))
            library.sft_incremental_writer_create(writer, os.fsencode(target), None, byref(incremental))
            done, total = 0, sum(nbytes for _, _, nbytes in tensors)
            for name, data, nbytes in tensors:
                library.sft_incremental_writer_write_tensor(incremental, name, len(name), data, nbytes)
                done += nbytes
                report_progress(done, total)
            library.sft_incremental_writer_commit(incremental)
    finally:
        library.sft_incremental_writer_free(incremental)
        library.sft_writer_free(writer)


def _metadata(library: Any, file: c_void_p) -> dict[str, str] | None:
    present, key, value = c_int32(), CStr(), CStr()
    library.sft_file_has_metadata(file, byref(present))
    if not present.value:
        return None
    metadata = {}
    for position in range(count_of(library.sft_file_get_metadata_count, file)):
        library.sft_file_get_metadata_entry(file, position, byref(key), byref(value))
        metadata[key.text()] = value.text()
    return metadata
