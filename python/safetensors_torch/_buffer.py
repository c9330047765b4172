"""Tensors over memory that Python objects own, without a copy, and over what open files hold.

Owns the dealings with the buffer protocol and with ``readinto``: torch.frombuffer alone warns about a read-only buffer
and does not keep a growable one (a bytearray) from moving. It knows nothing of the format.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer, whose layout is part of the stable ABI."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    ]


_PYBUF_SIMPLE = 0
_PYBUF_WRITE = 0x200

# An own handle: the prototypes of ctypes.pythonapi are shared with every other module of the process.
_python = ctypes.PyDLL(None)
_get_buffer = _python.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_get_buffer.restype = ctypes.c_int
_release_buffer = _python.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]
_release_buffer.restype = None
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
    """The bytes of an object with the buffer protocol where they are, or what is left of an open file, read."""
    try:
        return memoryview(data)
    except TypeError:
        if hasattr(data, "readinto"):
            return _read(data)
        raise TypeError(
            "data must be bytes or another object with the buffer protocol (bytearray, memoryview, mmap, an array), or"
            f' an open file with `readinto` (open it with "rb"), not {type(data).__name__}'
        ) from None


def _read(file: Any) -> memoryview:
    # One byte more than is left, so that the end is found before there is need of more memory.
    memory, filled = _new_memory(_left(file) + 1), 0
    while True:
        with memory[filled:] as rest:
            count = file.readinto(rest)
            if count is None:
                raise BlockingIOError(f"{type(file).__name__} has nothing to read yet; make the file a blocking one")
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
    """Memory that is not touched yet, unlike that of a new bytearray."""
    try:
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise MemoryError(f"{size} bytes to read a file into: {error}") from None


def _left(file: Any) -> int:
    """A guess at the bytes of a file that were not read yet."""
    try:
        if hasattr(file, "getbuffer"):
            return max(file.getbuffer().nbytes - file.tell(), 0)
        return max(os.fstat(file.fileno()).st_size - file.tell(), 0)
    except (AttributeError, OSError, ValueError):
        return 0


def exported(data: Any) -> tuple[torch.Tensor, memoryview]:
    """The bytes of ``data`` as a tensor, and the view that keeps them where they are: the tensor alone does not.

    Args:
        data: any object with the buffer protocol, of which what is not C-contiguous is copied first; or an open file,
            which is read from where it stands to its end.

    Returns:
        A uint8 CPU tensor of shape (number of bytes,), not to be written to, and a view to be kept for as long as the
        tensor is used.

    Raises:
        TypeError: ``data`` is neither.
    """
    view = _memoryview(data)
    if not view.c_contiguous:
        view = memoryview(view.tobytes())
    buffer = _PyBuffer()
    _get_buffer(view, ctypes.byref(buffer), _PYBUF_SIMPLE)
    _release_buffer(ctypes.byref(buffer))  # the view has the memory too
    return _tensor_over(buffer.buf, buffer.len), view


@contextmanager
def borrowed(data: Any) -> Iterator[torch.Tensor]:
    """The bytes of ``data``, as exported() takes it, for as long as the with block lasts.

    Yields:
        A uint8 CPU tensor of shape (number of bytes,), not to be written to, and not to be kept.

    Raises:
        TypeError: ``data`` is nothing that exported() takes.
    """
    tensor, view = exported(data)
    with view:
        yield tensor


def shared(data: Any) -> torch.Tensor:
    """The bytes of ``data`` as a tensor that keeps the buffer exported, so that it can be neither freed nor resized.

    Args:
        data: any object with the buffer protocol, writable and C-contiguous; or an open file, which is read.

    Returns:
        A uint8 CPU tensor of shape (number of bytes,) over the memory of ``data``.

    Raises:
        TypeError: ``data`` is neither.
        ValueError: ``data`` is read-only or not contiguous.
    """
    view = _memoryview(data)
    if view.readonly:
        raise ValueError(
            f"copy=False needs a writable buffer, and this {type(data).__name__} is read-only: tensors over it could"
            " change what Python takes for constant. Pass copy=True, or the bytes in a bytearray"
        )
    if not view.c_contiguous:
        raise ValueError("copy=False needs a contiguous buffer. Pass copy=True, or a contiguous copy of the buffer")
    if view.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(view, dtype=torch.uint8)


def new_bytes(size: int, fill: Callable[[torch.Tensor], Any]) -> bytes:
    """A bytes object of ``size`` bytes that ``fill`` writes in place.

    Args:
        size: number of bytes.
        fill: called once with a uint8 CPU tensor of shape (size,) over the new object's memory; nobody else has
            seen the object yet, which is what makes writing into it sound.
    """
    data = _new_bytes(None, size)
    fill(_tensor_over(_address_of_bytes(data), size))
    return data
