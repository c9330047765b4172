"""Files that Python clients read, for the native library: the functions of its sources and filesystems.

Owns the translation between the C structs and stores. The native library chooses the ranges, and _stores the client.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ._exceptions import defer_interrupt, os_error
from ._locations import RemotePath
from ._memory import address_of
from ._stores import Changed, Reader, Store, errno_of, text_of

_IO, _FILE_CHANGED = 2, 21  # in the C header
_INTERPRETED = 0x5AFE  # in the core


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


_Strings = ctypes.POINTER(ctypes.c_char_p)

_GetLength = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p)
_GetIdentity = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p)
_Read = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(_Buffer), ctypes.c_size_t, ctypes.c_void_p
)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_GetMaxRequests = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p)


class _Source(ctypes.Structure):
    """sft_source of the C header."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("context", ctypes.c_void_p),
        ("get_length", _GetLength),
        ("get_identity", _GetIdentity),
        ("read", _Read),
        ("free", _Free),
        ("get_max_requests", _GetMaxRequests),
    ]


_Open = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Source), ctypes.c_void_p)
_List = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(_Strings),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_void_p,
)


class Filesystem(ctypes.Structure):
    """sft_filesystem of the C header."""

    _fields_ = [("struct_size", ctypes.c_size_t), ("context", ctypes.c_void_p), ("open", _Open), ("list", _List)]


# The readers of the open files, and the stores in use, by the number that is their context.
_open: dict[int, Any] = {}
_numbers = itertools.count(1)
# What the functions have returned, by the context, which must stay until the next call on the thread. Not in a
# threading.local: on a thread that Python has not started, each call gets a new one.
_returned: dict[int, dict[Any, Any]] = {}

# The functions live as long as the process: the native library has their addresses.
_functions: list[Any] = []


class Calls:
    """The functions that one copy of the native library calls.

    Args:
        set_error: the address of its function as sft_source_error_set.
        success: what the functions return for success. Another number is Ctrl-C, which may end one before it begins.
    """

    def __init__(self, set_error: int, success: int) -> None:
        self._success = success
        self._set_error = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)(set_error)
        self._source = (
            _GetLength(self._get_length),
            _GetIdentity(self._get_identity),
            _Read(self._read),
            _Free(_forget),
            _GetMaxRequests(lambda context: _open[context].max_requests),
        )
        self._filesystem = _Open(self._open_source), _List(self._list)
        _functions.append(self)

    def source(self, reader: Reader) -> _Source:
        """Returns the source that ``reader`` reads."""
        number = next(_numbers)
        _open[number] = reader
        return _Source(ctypes.sizeof(_Source), number, *self._source)

    def filesystem(self, store: Store) -> Filesystem:
        """Returns the filesystem of ``store``; the caller calls forget() once it is not used any more."""
        number = next(_numbers)
        _open[number] = store
        return Filesystem(ctypes.sizeof(Filesystem), number, *self._filesystem)

    def _guarded(self, error: Any, function: Callable[[], None]) -> int:
        """Calls a function for the library, and passes its exception on."""
        try:
            try:
                function()
            except Changed:
                self._fail(error, 0, "the object was replaced while it was read; open it again")
                return _FILE_CHANGED
            except Exception as failure:
                self._fail(error, errno_of(failure), text_of(failure))
                return _IO
        except BaseException as failure:
            # Ctrl-C, in the thread that has called the library; also while it handles another exception.
            defer_interrupt(failure)
            self._fail(error, errno.EINTR, "interrupted")
            return _IO
        return self._success

    def _fail(self, error: Any, number: int, text: str) -> None:
        self._set_error(error, number, text.replace("\0", "\\0").encode("utf-8", "backslashreplace"))

    def _get_length(self, context: int, length: Any, error: int) -> int:
        def work() -> None:
            length[0] = _open[context].length()

        return self._guarded(error, work)

    def _get_identity(self, context: int, identity: Any, error: int) -> int:
        def work() -> None:
            found = _open[context].identity()
            if found is None:
                identity[0] = None
            else:
                identity[0] = _returned.setdefault(context, {}).setdefault(found, found.encode())

        return self._guarded(error, work)

    def _read(self, context: int, offset: int, buffers: Any, count: int, error: int) -> int:
        def work() -> None:
            targets = [(buffers[number].data, buffers[number].nbytes) for number in range(count)]
            nbytes = sum(size for _, size in targets)
            _fill(targets, _open[context].read(offset, nbytes))

        return self._guarded(error, work)

    def _open_source(self, context: int, path: bytes, source: Any, error: int) -> int:
        def work() -> None:
            source[0] = self.source(_open[context].open(path.decode()))

        return self._guarded(error, work)

    def _list(self, context: int, directory: bytes, names: Any, count: Any, error: int) -> int:
        def work() -> None:
            found = _open[context].list(directory.decode())
            if found is None:
                raise PermissionError("directories cannot be listed")
            # The library skips names that are not UTF-8, as no checkpoint has one.
            encoded = [name.encode("utf-8", "surrogateescape") for name in found]
            listed = [name for name in encoded if b"\0" not in name]
            array = _returned.setdefault(context, {})[threading.get_ident()] = (ctypes.c_char_p * len(listed))(*listed)
            names[0] = ctypes.cast(array, _Strings)
            count[0] = len(listed)

        return self._guarded(error, work)


def _fill(targets: list[tuple[int, int]], pieces: Iterator[Any]) -> None:
    """Copies pieces, one after the other, to addresses with sizes."""
    number, written = 0, 0
    for piece in pieces:
        with memoryview(piece) as view:
            start, left = address_of(view), view.nbytes
            while left > 0:
                if number == len(targets):
                    raise ConnectionError("the client returned too many bytes")
                target, size = targets[number]
                count = min(left, size - written)
                # Without the lock of the interpreter.
                ctypes.memmove(target + written, start, count)
                start, left, written = start + count, left - count, written + count
                if written == size:
                    number, written = number + 1, 0
    if sum(size for _, size in targets[number:]) > written:
        raise ConnectionError("the client returned too few bytes")


def _forget(context: int) -> None:
    _open.pop(context, None)
    _returned.pop(context, None)


def forget(filesystem: Filesystem) -> None:
    """Ends the use of a filesystem."""
    _forget(filesystem.context)


@functools.cache
def _layer() -> tuple[Any, Calls]:
    """Returns the operators of the native layer, and the functions that it calls."""
    import torch

    operators = torch.ops.safetensors_torch
    # Threads that read ahead may run when the interpreter ends, which they would not survive in it.
    atexit.register(operators._end_interpreter)
    return operators, Calls(operators._source_error_setter(), _INTERPRETED)


def open_file(path: RemotePath) -> Any:
    """Opens the native File of one file.

    Raises:
        ImportError: the client for it is not installed.
        OSError: there is no such file, or it cannot be read.
        SafetensorError: the file is not valid safetensors.
    """
    from ._errors import call

    title, store = path.title, path.store()
    local = named(title, lambda: store.cached(title))
    if local is not None:
        import torch

        return call(torch.classes.safetensors_torch.File, local.encode(), "mmap")
    operators, calls = _layer()
    source = calls.source(named(title, lambda: store.open(title)))
    # The library copies the functions, and frees the reader, also if this fails.
    return call(operators._open_source, ctypes.addressof(source), title, is_interpreted=True)


def open_checkpoint(path: RemotePath, variant: str | None, extra: str) -> Any:
    """Opens the native File of a file, of an index, or of a directory.

    Raises:
        As open_file; SafetensorError for what load_sharded raises.
    """
    from ._errors import call

    store = path.store()
    operators, calls = _layer()
    filesystem = calls.filesystem(store)
    try:
        where = ctypes.addressof(filesystem)
        return call(operators._open_filesystem, where, path.title, variant, extra, is_interpreted=True)
    finally:
        forget(filesystem)


def named(title: str, function: Callable[[], Any]) -> Any:
    """Calls a function of a store, and puts the title before the text of its error.

    Raises:
        OSError: what the client has raised, except for an ImportError.
    """
    try:
        return function()
    except ImportError:
        raise
    except Exception as failure:
        raise os_error(errno_of(failure), f"{title}: {text_of(failure)}") from None
