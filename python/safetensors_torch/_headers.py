"""Reads headers, edits metadata and copies tensors through the core's C library, without importing torch.

Owns the ctypes declarations of the C functions that it calls; include/safetensors_torch.h documents them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from ctypes import POINTER, byref, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from ._exceptions import SafetensorError, os_error, raise_interrupt
from ._locations import RemotePath

LIBRARY = Path(__file__).resolve().parent / "native" / "lib" / "libsafetensors_torch_c.so"
_IO = 2
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


class _Str(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("length", c_size_t)]

    def bytes(self) -> bytes:
        return ctypes.string_at(self.data, self.length) if self.length else b""

    def text(self) -> str:
        return self.bytes().decode()


class _TensorInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", _Str),
        ("rank", c_size_t),
        ("shape", POINTER(c_uint64)),
        ("nbytes", c_uint64),
        ("begin", c_uint64),
        ("end", c_uint64),
        ("dtype", c_int32),
        ("reserved", c_uint32),
    ]


class _LoadPlan(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("filesystem", c_char_p),
        ("reason", c_char_p),
        ("cached_bytes", c_uint64),
        ("request_bytes", c_uint64),
        ("readers", c_uint32),
        ("direct", c_uint32),
    ]


class _Change(ctypes.Structure):
    _fields_ = [("key", _Str), ("value", _Str)]


class _EditOptions(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("reserve", c_uint64), ("in_place", c_uint32), ("durable", c_uint32)]


_SIGNATURES = {
    "checkpoint_open": [c_char_p, c_void_p, POINTER(c_void_p)],
    "checkpoint_open_in": [c_void_p, c_char_p, c_void_p, POINTER(c_void_p)],
    "checkpoint_get_shard_count": [c_void_p, POINTER(c_size_t)],
    "checkpoint_get_shard": [c_void_p, c_size_t, POINTER(_Str), POINTER(c_void_p)],
    "file_get_tensor_count": [c_void_p, POINTER(c_size_t)],
    "file_get_tensor_info": [c_void_p, c_size_t, POINTER(_TensorInfo)],
    "file_has_metadata": [c_void_p, POINTER(c_int32)],
    "file_get_metadata_count": [c_void_p, POINTER(c_size_t)],
    "file_get_metadata_entry": [c_void_p, c_size_t, POINTER(_Str), POINTER(_Str)],
    "file_get_data": [c_void_p, c_size_t, POINTER(c_void_p)],
    "file_explain_load": [c_void_p, c_uint32, POINTER(_LoadPlan)],
    "edit_metadata": [c_char_p, POINTER(_Change), c_size_t, POINTER(_EditOptions)],
    "writer_new": [POINTER(c_void_p)],
    "writer_enable_metadata": [c_void_p],
    "writer_add_metadata": [c_void_p, c_char_p, c_size_t, c_char_p, c_size_t],
    "writer_declare_tensor": [c_void_p, c_char_p, c_size_t, c_int32, POINTER(c_uint64), c_size_t],
    "incremental_writer_create": [c_void_p, c_char_p, c_void_p, POINTER(c_void_p)],
    "incremental_writer_write_tensor": [c_void_p, c_char_p, c_size_t, c_void_p, c_size_t],
    "incremental_writer_commit": [c_void_p],
}


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise OSError(
            f"the package's C library does not load: {error}; if it was built for a newer system, build the package on"
            " this one (pip install .)"
        ) from None
    for name, types in _SIGNATURES.items():
        function = getattr(library, f"sft_{name}")
        function.argtypes, function.restype, function.errcheck = types, c_int32, _check
    for handle in ("checkpoint", "writer", "incremental_writer"):
        free = getattr(library, f"sft_{handle}_free")
        free.argtypes, free.restype = [c_void_p], None
    library.sft_dtype_get_code.argtypes, library.sft_dtype_get_code.restype = [c_int32], c_char_p
    library.sft_last_error_get_message.restype = c_char_p
    return library


def _check(status: int, function: Any, arguments: Any) -> int:
    """Raises the error that a function of the library reports."""
    if status == 0:
        return status
    raise_interrupt()
    message = _library().sft_last_error_get_message().decode(errors="replace")
    if status == _IO:
        raise os_error(_library().sft_last_error_get_os_error(), message)
    error = SafetensorError(message)
    error._code = status
    raise error


def read_headers(path: str | bytes | RemotePath) -> Headers:
    """Reads the headers of the checkpoint at ``path``: a file, an index, or a directory with either.

    Raises:
        SafetensorError: a file is not valid safetensors, or does not fit the index.
        OSError: a file cannot be read, or the package lacks the C library.
    """
    library, headers = _library(), Headers([], None, [])
    with _shards(library, path) as shards:
        for name, file in shards:
            headers.files.append(name)
            for info in _infos(library, file):
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
    library, files = _library(), []
    is_file = not os.path.isdir(path) and not path.endswith(".json")
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    with _shards(library, path) as shards:
        for name, file in shards:
            plan, plans = _LoadPlan(struct_size=ctypes.sizeof(_LoadPlan)), []
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
    array = (_Change * len(texts))(*[_Change(_str(key), _str(value)) for key, value in texts])
    options = _EditOptions(struct_size=ctypes.sizeof(_EditOptions), in_place=in_place)
    _library().sft_edit_metadata(os.fsencode(path), array, len(array), byref(options))


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
    library, writer, incremental = _library(), c_void_p(), c_void_p()
    library.sft_writer_new(byref(writer))
    try:
        with _shards(library, path) as shards:
            tensors = []
            for _, file in shards:
                for index, info in enumerate(_infos(library, file)):
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


def _str(text: bytes | None) -> _Str:
    """Returns a view of ``text``, which must stay alive; None is NULL."""
    return _Str() if text is None else _Str(ctypes.cast(c_char_p(text), c_void_p), len(text))


@contextlib.contextmanager
def _shards(library: Any, path: str | bytes | RemotePath) -> Iterator[list[tuple[str, c_void_p]]]:
    """Opens the checkpoint at ``path``. Yields the name and the handle of each file."""
    checkpoint, shards = c_void_p(), []
    if isinstance(path, RemotePath):
        _open_remote(library, path, checkpoint)
    else:
        library.sft_checkpoint_open(os.fsencode(path), None, byref(checkpoint))
    try:
        for shard in range(_count(library.sft_checkpoint_get_shard_count, checkpoint)):
            name, file = _Str(), c_void_p()
            library.sft_checkpoint_get_shard(checkpoint, shard, byref(name), byref(file))
            shards.append((os.fsdecode(name.bytes()), file))
        yield shards
    finally:
        library.sft_checkpoint_free(checkpoint)


def _open_remote(library: Any, path: RemotePath, checkpoint: c_void_p) -> None:
    from . import _remote

    filesystem = _remote_calls().filesystem(path.store())
    try:
        library.sft_checkpoint_open_in(byref(filesystem), path.title.encode(), None, byref(checkpoint))
    finally:
        _remote.forget(filesystem)


@functools.cache
def _remote_calls() -> Any:
    """Returns the functions that the C library calls."""
    from ._remote import Calls

    set_error = ctypes.cast(_library().sft_source_error_set, c_void_p).value
    assert set_error is not None
    return Calls(set_error, 0)


def _count(function: Any, handle: c_void_p) -> int:
    count = c_size_t()
    function(handle, byref(count))
    return count.value


def _infos(library: Any, file: c_void_p) -> Iterator[_TensorInfo]:
    """Returns the description of each tensor in turn, in one structure."""
    info = _TensorInfo(struct_size=ctypes.sizeof(_TensorInfo))
    for index in range(_count(library.sft_file_get_tensor_count, file)):
        library.sft_file_get_tensor_info(file, index, byref(info))
        yield info


def _metadata(library: Any, file: c_void_p) -> dict[str, str] | None:
    present, key, value = c_int32(), _Str(), _Str()
    library.sft_file_has_metadata(file, byref(present))
    if not present.value:
        return None
    metadata = {}
    for position in range(_count(library.sft_file_get_metadata_count, file)):
        library.sft_file_get_metadata_entry(file, position, byref(key), byref(value))
        metadata[key.text()] = value.text()
    return metadata
