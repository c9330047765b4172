"""Reads the headers of files and checkpoints through the core's C library, without the seconds of importing torch.

Owns the ctypes declarations of the C functions that it calls; include/safetensors_torch.h documents them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, byref, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from ._exceptions import SafetensorError, os_error

LIBRARY = Path(__file__).resolve().parent / "native" / "lib" / "libsafetensors_torch_c.so"
_IO = 2


class Tensor(NamedTuple):
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
    tensors: list[Tensor]
    """File after file, in the order of their data."""


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


_SIGNATURES = {
    "checkpoint_open": [c_char_p, c_void_p, POINTER(c_void_p)],
    "checkpoint_get_shard_count": [c_void_p, POINTER(c_size_t)],
    "checkpoint_get_shard": [c_void_p, c_size_t, POINTER(_Str), POINTER(c_void_p)],
    "file_get_tensor_count": [c_void_p, POINTER(c_size_t)],
    "file_get_tensor_info": [c_void_p, c_size_t, POINTER(_TensorInfo)],
    "file_has_metadata": [c_void_p, POINTER(c_int32)],
    "file_get_metadata_count": [c_void_p, POINTER(c_size_t)],
    "file_get_metadata_entry": [c_void_p, c_size_t, POINTER(_Str), POINTER(_Str)],
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
    library.sft_checkpoint_free.argtypes, library.sft_checkpoint_free.restype = [c_void_p], None
    library.sft_dtype_get_code.argtypes, library.sft_dtype_get_code.restype = [c_int32], c_char_p
    library.sft_last_error_get_message.restype = c_char_p
    return library


def _check(status: int, function: Any, arguments: Any) -> int:
    """Raises the error that a function of the library reports."""
    if status == 0:
        return status
    message = _library().sft_last_error_get_message().decode(errors="replace")
    if status == _IO:
        raise os_error(_library().sft_last_error_get_os_error(), message)
    error = SafetensorError(message)
    error._code = status
    raise error


def read_headers(path: str) -> Headers:
    """Reads the headers of the checkpoint at ``path``: a file, an index, or a directory with either.

    Raises:
        SafetensorError: a file is not valid safetensors, or does not fit the index.
        OSError: a file cannot be read, or the package lacks the C library.
    """
    library, checkpoint = _library(), c_void_p()
    library.sft_checkpoint_open(os.fsencode(path), None, byref(checkpoint))
    try:
        headers = Headers([], None, [])
        for shard in range(_count(library.sft_checkpoint_get_shard_count, checkpoint)):
            name, file = _Str(), c_void_p()
            library.sft_checkpoint_get_shard(checkpoint, shard, byref(name), byref(file))
            headers.files.append(os.fsdecode(name.bytes()))
            headers.tensors.extend(_tensors(library, file, headers.files[-1]))
            metadata = _metadata(library, file)
            if metadata is not None:
                # The first file that has a key counts, as for safe_open.
                headers = headers._replace(metadata={**metadata, **(headers.metadata or {})})
        return headers
    finally:
        library.sft_checkpoint_free(checkpoint)


def _count(function: Any, handle: c_void_p) -> int:
    count = c_size_t()
    function(handle, byref(count))
    return count.value


def _tensors(library: Any, file: c_void_p, name: str) -> list[Tensor]:
    info, tensors = _TensorInfo(struct_size=ctypes.sizeof(_TensorInfo)), []
    for index in range(_count(library.sft_file_get_tensor_count, file)):
        library.sft_file_get_tensor_info(file, index, byref(info))
        dtype = library.sft_dtype_get_code(info.dtype).decode()
        tensors.append(Tensor(info.name.text(), dtype, info.shape[: info.rank], info.nbytes, name, info.begin))
    return tensors


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
