"""Tensors over the memory of Python buffers, without a copy, and over the contents of open files.

Owns the use of the buffer protocol and of ``readinto``. torch.frombuffer alone warns about a read-only buffer, and does
not keep a bytearray from being resized.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ._memory import address_of

_PYBUF_WRITE = 0x200

# Not ctypes.pythonapi: every module of the process shares its prototypes.
_python = ctypes.PyDLL(None)
_view_of_memory = _python.PyMemoryView_FromMemory
_view_of_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_view_of_memory.restype = ctypes.py_object
_new_bytes = _python.PyBytes_FromStringAndSize
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_new_bytes.restype = ctypes.py_object
_address_of_bytes = _python.PyBytes_AsString
_address_of_bytes.argtypes = [ctypes.py_object]
_address_of_bytes.restype = ctypes.c_void_p


def _tensor_over(address: int, size: int) -> torch.Tensor:
    if size == 0:  # which torch.frombuffer refuses
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(_view_of_memory(address, size, _PYBUF_WRITE), dtype=torch.uint8)


def _memoryview(data: Any) -> memoryview:
    """Returns a view of an object with the buffer protocol, or of the rest of an open file, which is read."""
    try:
        return memoryview(data)
    except TypeError:
        if hasattr(data, "readinto"):
            return _read(data)
        remedy = "; load_file(filename) reads a file" if isinstance(data, (str, os.PathLike)) else ""
        raise TypeError(
            "data must be bytes or another object with the buffer protocol (bytearray, memoryview, mmap, an array), or"
            f' an open file with `readinto` (open it with "rb"), not {type(data).__name__}{remedy}'
        ) from None


def _read(file: Any) -> memoryview:
    # One byte more than expected, so that the end is found before the memory has to grow.
    memory, filled = _new_memory(_remaining_bytes(file) + 1), 0
    while True:
        with memory[filled:] as rest:
            count = file.readinto(rest)
            if count is None:
                raise BlockingIOError(f"{type(file).__name__} has no data yet; open the file in blocking mode")
            if not 0 <= count <= len(rest):
                raise OSError(f"{type(file).__name__}.readinto returned {count} for a buffer of {len(rest)} bytes")
        if count == 0:
            return memory[:filled]
        filled += count
        if filled == len(memory):
            more = _new_memory(max(2 * filled, 1 << 20))
            more[:filled] = memory
            memory = more


def _new_memory(size: int) -> memoryview:
    """Returns memory whose pages are untouched, unlike those of a new bytearray."""
    try:
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise MemoryError(f"cannot allocate {size} bytes for the contents of the file: {error}") from None


def _remaining_bytes(file: Any) -> int:
    """Returns an estimate of the bytes between a file's position and its end."""
    try:
        if hasattr(file, "getbuffer"):
            return max(file.getbuffer().nbytes - file.tell(), 0)
        return max(os.fstat(file.fileno()).st_size - file.tell(), 0)
    except (AttributeError, OSError, ValueError):
        return 0


def exported(data: Any) -> tuple[torch.Tensor, memoryview]:
    """Returns the bytes of ``data`` as a tensor, and the view that keeps the memory alive: the tensor alone does not.

    Args:
        data: an object with the buffer protocol, which is copied if it is not C-contiguous; or an open file, which is
            read from its position to its end.

    Returns:
        A uint8 CPU tensor of shape (number of bytes,), to be read only, and a view to keep as long as the tensor is
        used.

    Raises:
        TypeError: ``data`` is neither.
    """
    view = _memoryview(data)
    if not view.c_contiguous:
        view = memoryview(view.tobytes())
    return _tensor_over(address_of(view), view.nbytes), view


@contextmanager
def borrowed(data: Any) -> Iterator[torch.Tensor]:
    """Yields the tensor of exported(data), which is valid within the with block."""
    tensor, view = exported(data)
    with view:
        yield tensor


def shared(data: Any) -> torch.Tensor:
    """Returns the bytes of ``data`` as a tensor that keeps the buffer exported: it can be neither freed nor resized.

    Args:
        data: a writable, C-contiguous object with the buffer protocol; or an open file, which is read.

    Returns:
        A uint8 CPU tensor of shape (number of bytes,) over the memory of ``data``.

    Raises:
        TypeError: ``data`` is neither.
        ValueError: ``data`` is read-only or not contiguous.
    """
    view = _memoryview(data)
    if view.readonly:
        raise ValueError(
            f"copy=False needs a writable buffer, and this {type(data).__name__} is read-only: writing to a"
            " tensor would change immutable data. Pass copy=True, or the bytes in a bytearray"
        )
    if not view.c_contiguous:
        raise ValueError("copy=False needs a contiguous buffer. Pass copy=True, or a contiguous copy of the buffer")
    if view.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(view, dtype=torch.uint8)


def new_bytes(size: int, fill: Callable[[torch.Tensor], Any]) -> bytes:
    """Returns a bytes object of ``size`` bytes that ``fill`` has written in place.

    Args:
        size: the number of bytes.
        fill: called once with a uint8 CPU tensor of shape (size,) over the memory of the new object. Writing there is
            sound because there is no other reference to the object yet.
    """
    data = _new_bytes(None, size)
    fill(_tensor_over(_address_of_bytes(data), size))
    return data
