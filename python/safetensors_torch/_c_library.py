"""The core's C library, without importing torch: headers, edits, copies and statistics need no more.

Owns the ctypes declarations of the C functions that the package calls; include/safetensors_torch.h documents them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from ._exceptions import SafetensorError, os_error, raise_interrupt
from ._locations import RemotePath

LIBRARY = Path(__file__).resolve().parent / "native" / "lib" / "libsafetensors_torch_c.so"
MMAP, PREAD = 0, 1
"""The backends: files are mapped, or read."""
_IO = 2


class CStr(ctypes.Structure):
    """sft_str of the C header."""

    _fields_ = [("data", c_void_p), ("length", c_size_t)]

    def bytes(self) -> bytes:
        return ctypes.string_at(self.data, self.length) if self.length else b""

    def text(self) -> str:
        return self.bytes().decode()


class CTensorInfo(ctypes.Structure):
    """sft_tensor_info of the C header."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("name", CStr),
        ("rank", c_size_t),
        ("shape", POINTER(c_uint64)),
        ("nbytes", c_uint64),
        ("begin", c_uint64),
        ("end", c_uint64),
        ("dtype", c_int32),
        ("reserved", c_uint32),
    ]


class CLoadPlan(ctypes.Structure):
    """sft_load_plan of the C header."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("filesystem", c_char_p),
        ("reason", c_char_p),
        ("cached_bytes", c_uint64),
        ("request_bytes", c_uint64),
        ("readers", c_uint32),
        ("direct", c_uint32),
    ]


class CChange(ctypes.Structure):
    """sft_metadata_change of the C header."""

    _fields_ = [("key", CStr), ("value", CStr)]


class CEditOptions(ctypes.Structure):
    """sft_edit_options of the C header."""

    _fields_ = [("struct_size", c_size_t), ("reserve", c_uint64), ("in_place", c_uint32), ("durable", c_uint32)]


class _CheckpointOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("backend", c_uint32),
        ("prefault", c_uint32),
        ("variant", c_char_p),
        ("extra", c_uint32),
        ("reserved", c_uint32),
    ]


class CStatistics(ctypes.Structure):
    """sft_statistics of the C header."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("count", c_uint64),
        ("zeros", c_uint64),
        ("nans", c_uint64),
        ("infinities", c_uint64),
        ("minimum", c_double),
        ("maximum", c_double),
        ("mean", c_double),
        ("squared_deviations", c_double),
    ]


class CHistogram(ctypes.Structure):
    """sft_histogram of the C header."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("first", c_int64),
        ("width", c_double),
        ("bin_count", c_uint64),
        ("counts", c_uint64 * 128),
    ]


class CStatisticsRequest(ctypes.Structure):
    """sft_statistics_request of the C header."""

    _fields_ = [
        ("index", c_size_t),
        ("first", c_uint64),
        ("count", c_uint64),
        ("statistics", POINTER(CStatistics)),
        ("histogram", POINTER(CHistogram)),
    ]


_SIGNATURES = {
    "checkpoint_open": [c_char_p, c_void_p, POINTER(c_void_p)],
    "checkpoint_open_in": [c_void_p, c_char_p, c_void_p, POINTER(c_void_p)],
    "checkpoint_get_shard_count": [c_void_p, POINTER(c_size_t)],
    "checkpoint_get_shard": [c_void_p, c_size_t, POINTER(CStr), POINTER(c_void_p)],
    "file_get_tensor_count": [c_void_p, POINTER(c_size_t)],
    "file_get_tensor_info": [c_void_p, c_size_t, POINTER(CTensorInfo)],
    "file_has_metadata": [c_void_p, POINTER(c_int32)],
    "file_get_metadata_count": [c_void_p, POINTER(c_size_t)],
    "file_get_metadata_entry": [c_void_p, c_size_t, POINTER(CStr), POINTER(CStr)],
    "file_get_data": [c_void_p, c_size_t, POINTER(c_void_p)],
    "file_compute_statistics": [c_void_p, POINTER(CStatisticsRequest), c_size_t],
    "file_explain_load": [c_void_p, c_uint32, POINTER(CLoadPlan)],
    "edit_metadata": [c_char_p, POINTER(CChange), c_size_t, POINTER(CEditOptions)],
    "writer_new": [POINTER(c_void_p)],
    "writer_enable_metadata": [c_void_p],
    "writer_add_metadata": [c_void_p, c_char_p, c_size_t, c_char_p, c_size_t],
    "writer_declare_tensor": [c_void_p, c_char_p, c_size_t, c_int32, POINTER(c_uint64), c_size_t],
    "incremental_writer_create": [c_void_p, c_char_p, c_void_p, POINTER(c_void_p)],
    "incremental_writer_write_tensor": [c_void_p, c_char_p, c_size_t, c_void_p, c_size_t],
    "incremental_writer_commit": [c_void_p],
}


@functools.cache
def c_library() -> Any:
    """Returns the library, whose functions raise the errors that they report.

    Raises:
        OSError: it cannot be loaded.
    """
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
    library.sft_dtype_get_bits.argtypes, library.sft_dtype_get_bits.restype = [c_int32], c_uint32
    library.sft_last_error_get_message.restype = c_char_p
    return library


def _check(status: int, function: Any, arguments: Any) -> int:
    """Raises the error that a function of the library reports."""
    if status == 0:
        return status
    raise_interrupt()
    message = c_library().sft_last_error_get_message().decode(errors="replace")
    if status == _IO:
        raise os_error(c_library().sft_last_error_get_os_error(), message)
    error = SafetensorError(message)
    error._code = status
    raise error


def c_str(text: bytes | None) -> CStr:
    """Returns a view of ``text``, which must stay alive; None is NULL."""
    return CStr() if text is None else CStr(ctypes.cast(c_char_p(text), c_void_p), len(text))


@contextlib.contextmanager
def open_files(
    library: Any, path: str | bytes | RemotePath, backend: int = MMAP
) -> Iterator[list[tuple[str, c_void_p]]]:
    """Opens the checkpoint at ``path``. Yields the name and the handle of each file."""
    checkpoint, shards = c_void_p(), []
    if isinstance(path, RemotePath):
        _open_remote(library, path, checkpoint)
    else:
        options = _CheckpointOptions(struct_size=ctypes.sizeof(_CheckpointOptions), backend=backend)
        library.sft_checkpoint_open(os.fsencode(path), byref(options), byref(checkpoint))
    try:
        for shard in range(count_of(library.sft_checkpoint_get_shard_count, checkpoint)):
            name, file = CStr(), c_void_p()
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

    set_error = ctypes.cast(c_library().sft_source_error_set, c_void_p).value
    assert set_error is not None
    return Calls(set_error, 0)


def count_of(function: Any, handle: c_void_p) -> int:
    """Returns the number that a function of the library sets for a handle."""
    count = c_size_t()
    function(handle, byref(count))
    return count.value


def tensor_infos(library: Any, file: c_void_p) -> Iterator[CTensorInfo]:
    """Returns the description of each tensor in turn, in one structure."""
    info = CTensorInfo(struct_size=ctypes.sizeof(CTensorInfo))
    for index in range(count_of(library.sft_file_get_tensor_count, file)):
        library.sft_file_get_tensor_info(file, index, byref(info))
        yield info
