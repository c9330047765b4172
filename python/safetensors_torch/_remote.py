"""URLs: files in buckets and on servers, read through clients that the user has installed.

Owns the choice of the client for a URL, and the translation of its errors. The native library chooses the ranges.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import itertools
import re
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from . import _buffer
from ._errors import call

_ops = torch.ops.safetensors_torch

# What obstore reads; fsspec reads the others.
_OBSTORE = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")

_IO, _FILE_CHANGED = 2, 21  # in the C header

# A read is tried again after errors that may pass, after 0.1, 0.2, 0.4 and 0.8 seconds. obstore repeats requests too.
_ATTEMPTS = 5
_FIRST_DELAY = 0.1

# How long what fsspec says about a file counts.
_IDENTITY_SECONDS = 1.0


class Changed(Exception):
    """The object has other bytes than when it was opened."""


class _Client(Protocol):
    """What a client does for one file. Several threads call read."""

    def length(self) -> int: ...

    def identity(self) -> str | None:
        """Returns what changes with the bytes; None if read makes sure of it."""

    def read(self, offset: int, nbytes: int) -> Any:
        """Returns a buffer with these bytes."""

    def may_pass(self, error: Exception) -> bool:
        """Returns whether an error of read may pass."""


class _Obstore:
    """An object of a store of obstore: S3, Google Cloud, Azure, or HTTP."""

    def __init__(self, store: Any, path: str) -> None:
        import obstore

        self._obstore, self._store, self._path = obstore, store, path
        self._condition: dict[str, Any] = {}

    @classmethod
    def of_url(cls, url: str) -> _Obstore:
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise _missing(url, "obstore", "safetensors-torch[remote]") from error
        match = re.fullmatch(r"(\w+://[^/]+)/(.+)", url)
        if match is None:
            raise ValueError(f"{public_url(url)} has no path; name a file in the bucket")
        options = {"client_options": {"allow_http": True}} if match[1].startswith("http:") else {}
        return cls(from_url(match[1], **options), match[2])

    def length(self) -> int:
        meta = self._obstore.head(self._store, self._path)
        if meta.get("e_tag"):
            self._condition = {"if_match": meta["e_tag"]}
        return meta["size"]

    def identity(self) -> str | None:
        return None  # reads have If-Match

    def read(self, offset: int, nbytes: int) -> Any:
        options = {"range": (offset, offset + nbytes), **self._condition}
        try:
            return self._obstore.get(self._store, self._path, options=options).bytes()
        except self._obstore.exceptions.PreconditionError as error:
            raise Changed from error

    def may_pass(self, error: Exception) -> bool:
        # Whatever has no class of its own: connections that break while the bytes arrive.
        return type(error) is self._obstore.exceptions.GenericError


class _Fsspec:
    """A file of a filesystem of fsspec."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._lock = threading.Lock()
        self._identity: tuple[float, str | None] = 0.0, None

    @classmethod
    def of_url(cls, url: str) -> _Fsspec:
        try:
            from fsspec.core import url_to_fs

            filesystem, path = url_to_fs(url)
        except ImportError as error:
            if url.lower().startswith("hf:"):
                raise _missing(url, "huggingface_hub", "safetensors-torch[hf]") from error
            raise ImportError(f"{public_url(url)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{public_url(url)}: no client reads such URLs: {error}") from None
        return cls(filesystem, path)

    def _info(self) -> dict[str, Any]:
        self._filesystem.invalidate_cache(self._path)
        return self._filesystem.info(self._path)

    def length(self) -> int:
        info = self._info()
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        return info["size"]

    def identity(self) -> str | None:
        with self._lock:
            since, identity = self._identity
            if identity is None or time.monotonic() - since > _IDENTITY_SECONDS:
                info = self._info()
                keys = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "created", "md5Hash")
                identity = " ".join(f"{key}={info[key]}" for key in keys if key in info)
                self._identity = time.monotonic(), identity
            return identity

    def read(self, offset: int, nbytes: int) -> Any:
        return self._filesystem.cat_file(self._path, start=offset, end=offset + nbytes)

    def may_pass(self, error: Exception) -> bool:
        passing = (ConnectionError, TimeoutError)
        return isinstance(error, passing) or type(error).__name__ in ("ClientError", "ServerDisconnectedError")


def _missing(url: str, package: str, extra: str) -> ImportError:
    return ImportError(f"{public_url(url)}: such URLs need {package}; install it (pip install {extra})")


def public_url(url: str) -> str:
    """Returns a URL without what may be a secret: the user, and the query."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0]


def open_url(url: str) -> Any:
    """Opens the native File of a URL.

    Raises:
        ImportError: the client for it is not installed.
        OSError: there is no such file, or it cannot be read.
        SafetensorError: the file is not valid safetensors.
    """
    scheme = url.partition("://")[0].lower()
    return open_client(_Obstore.of_url(url) if scheme in _OBSTORE else _Fsspec.of_url(url), public_url(url))


def open_client(client: _Client, name: str) -> Any:
    """Opens the native File that a client reads."""
    number = next(_numbers)
    _open[number] = client
    source = _Source(ctypes.sizeof(_Source), number, _GET_LENGTH, _GET_IDENTITY, _READ, _FREE)
    # The library copies the functions, which live as long as this module.
    return call(_ops._open_source, ctypes.addressof(source), name, is_interpreted=True)


# Threads that read ahead may run when the interpreter ends, which they would not survive in it.
atexit.register(_ops._end_interpreter)


# The clients of the open files, by the number that is their context.
_open: dict[int, _Client] = {}
_numbers = itertools.count(1)
_identities = threading.local()


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


_GetLength = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p)
_GetIdentity = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p)
_Read = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(_Buffer), ctypes.c_size_t, ctypes.c_void_p
)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Source(ctypes.Structure):
    """sft_source of the C header."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("context", ctypes.c_void_p),
        ("get_length", _GetLength),
        ("get_identity", _GetIdentity),
        ("read", _Read),
        ("free", _Free),
    ]


def _guarded(error: Any, function: Callable[[], None]) -> int:
    """Calls a function for the library, and passes its exception on."""
    try:
        function()
    except Changed:
        return _fail(error, _FILE_CHANGED, 0, "the object was replaced while it was read; open it again")
    except BaseException as failure:
        return _fail(error, _IO, _errno_of(failure), _text_of(failure))
    return 0


def _fail(error: Any, status: int, number: int, text: str) -> int:
    _set_error()(error, number, text.replace("\0", "\\0").encode("utf-8", "backslashreplace"))
    return status


def _errno_of(failure: BaseException) -> int:
    if isinstance(failure, OSError) and failure.errno is not None:
        return failure.errno
    if isinstance(failure, FileNotFoundError):
        return errno.ENOENT
    # obstore's, which are not an OSError.
    is_denied = type(failure).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    return errno.EACCES if is_denied or isinstance(failure, PermissionError) else errno.EIO


def _text_of(failure: BaseException) -> str:
    # obstore adds the structure of its errors.
    text = " ".join(str(failure).split()).partition(" Debug source:")[0].removesuffix(":")[:500]
    # Some messages have a URL with its signature.
    text = re.sub(r"(\w+://)[^\s/@]*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?]*)\?\S+", r"\1", text)
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__


_setter: list[Any] = []


def _set_error() -> Any:
    """Returns a function as sft_source_error_set, of the loaded library."""
    if not _setter:
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)
        _setter.append(kind(_ops._source_error_setter()))
    return _setter[0]


@_GetLength
def _GET_LENGTH(context: int, length: Any, error: int) -> int:  # noqa: N802 - constants
    def work() -> None:
        client = _open[context]
        length[0] = _retried(client, client.length)

    return _guarded(error, work)


@_GetIdentity
def _GET_IDENTITY(context: int, identity: Any, error: int) -> int:  # noqa: N802
    def work() -> None:
        client = _open[context]
        found = _retried(client, client.identity)
        # Until the next call on this thread.
        _identities.last = None if found is None else found.encode()
        identity[0] = _identities.last

    return _guarded(error, work)


@_Read
def _READ(context: int, offset: int, buffers: Any, count: int, error: int) -> int:  # noqa: N802
    def work() -> None:
        client = _open[context]
        nbytes = sum(buffers[number].nbytes for number in range(count))

        def read() -> Any:
            data = client.read(offset, nbytes)
            if memoryview(data).nbytes != nbytes:
                raise ConnectionError(f"{memoryview(data).nbytes} of {nbytes} bytes arrived")
            return data

        with _buffer.borrowed(_retried(client, read)) as data:
            start = data.data_ptr()
            for number in range(count):
                # Without the lock of the interpreter.
                ctypes.memmove(buffers[number].data, start, buffers[number].nbytes)
                start += buffers[number].nbytes

    return _guarded(error, work)


@_Free
def _FREE(context: int) -> None:  # noqa: N802
    _open.pop(context, None)


def _retried(client: _Client, function: Callable[[], Any]) -> Any:
    """Calls a function, again after errors that may pass."""
    for attempt in range(_ATTEMPTS):
        try:
            return function()
        except Exception as failure:
            is_short = type(failure) is ConnectionError
            if attempt + 1 == _ATTEMPTS or not (is_short or client.may_pass(failure)):
                raise
            time.sleep(_FIRST_DELAY * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
