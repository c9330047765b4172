"""Stores: buckets, servers and the Hub, through the clients that the user has installed.

Owns the choice of the client for a URL, and what its errors mean. Without torch, for the shell command.

A title is what users see of a file's path: a URL without secrets, or a path in the filesystem that the user gave.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any, Protocol

from ._locations import BUCKETS, title_of_url

# What obstore reads; huggingface_hub finds the files of the Hub, and fsspec reads all others.
_OBSTORE = (*BUCKETS, "http", "https")

# The first request, for the header; as in the native library.
START_BYTES = 1 << 20

# The parts of an upload: of this size, unless the file has more bytes than so many parts have.
_PART_BYTES = 8 << 20
_MOST_PARTS = 9000

# The numbers of errors that a client raises without one.
_NUMBERS = {
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    TimeoutError: errno.ETIMEDOUT,
}

# The status in the messages of obstore. Its errors of writes are an OSError without a number.
_STATUS = re.compile(r"status code: (\d+)")

# The code of an answer 400 of S3 to credentials that are too old.
_EXPIRED = re.compile("<Code>(ExpiredToken|InvalidToken|TokenRefreshRequired|RequestTimeTooSkewed)</Code>")


class Changed(Exception):
    """The object has other bytes than when it was opened."""


class Reader(Protocol):
    """A file. Several threads call read."""

    max_requests: int
    """How many calls of read may run at once; 0 for as many as suit. Known once the length is."""

    def length(self) -> int:
        """Opens the file, and returns its size in bytes."""

    def identity(self) -> str | None:
        """Returns what changes with the bytes; None if read makes sure of it."""

    def read(self, offset: int, nbytes: int) -> Iterator[Any]:
        """Yields these bytes in buffers."""


class Writer(Protocol):
    """A file that is written from its start to its end, and appears when it is committed."""

    def write(self, data: Any) -> Any: ...

    def commit(self) -> None: ...

    def abort(self) -> None:
        """Leaves what the name had before."""


class Store:
    """Files by their titles."""

    def open(self, title: str) -> Reader:
        """Returns the file, which is opened by its length()."""
        raise NotImplementedError

    def list(self, directory: str) -> list[str] | None:
        """Returns the names of the files in a directory; None if the store lists none."""
        raise NotImplementedError

    def create(self, title: str, nbytes: int) -> Writer:
        """Begins a file of about this size."""
        raise NotImplementedError

    def remove(self, title: str) -> None:
        """Removes a file, if it exists."""
        raise NotImplementedError

    def cached(self, title: str) -> str | None:
        """Returns the path of a local copy that never changes, if there is one."""
        return None


def store_of(path: str, filesystem: Any = None) -> Store:
    """Returns the store for a URL, or for a path in ``filesystem``.

    Raises:
        ImportError: the client for it is not installed.
        ValueError: no client takes such a URL, or it names no file; a URL together with a store.
        TypeError: ``filesystem`` is neither a store of obstore nor a filesystem of fsspec.
    """
    if filesystem is not None:
        bases = () if isinstance(filesystem, type) else type(filesystem).__mro__
        modules = [base.__module__ for base in bases]
        if any(module.partition(".")[0] == "obstore" for module in modules):
            from ._store_obstore import ObstoreStore

            if "://" in path:
                raise ValueError(f"{title_of_url(path)} is a URL; pass the path in the filesystem, or no filesystem")
            return ObstoreStore(filesystem)
        if "fsspec.spec" in modules:
            from ._store_fsspec import FsspecStore

            return FsspecStore(filesystem, path=path)
        raise TypeError(
            f"filesystem must be a store of obstore or a filesystem of fsspec, not {type(filesystem).__name__}"
        )
    scheme = path.partition("://")[0].lower()
    if scheme in _OBSTORE:
        from ._store_obstore import store_of_url

        return store_of_url(path)
    if scheme == "hf":
        from ._store_hub import HubStore, is_in_repository

        if is_in_repository(path):
            return HubStore(path)
    from ._store_fsspec import FsspecStore

    return FsspecStore.of_url(path)


def missing_client(url: str, package: str, extra: str) -> ImportError:
    """Returns the error about a client that is not installed."""
    return ImportError(f"{title_of_url(url)}: such URLs need {package}; install it (pip install {extra})")


def part_bytes(nbytes: int) -> int:
    """Returns the size of the parts in which a file of ``nbytes`` bytes is uploaded."""
    return max(_PART_BYTES, -(-nbytes // _MOST_PARTS))


def is_denied(failure: BaseException) -> bool:
    """Returns whether the credentials are missing, wrong or too old."""
    # obstore's errors are not an OSError. S3 answers 400 after the end of a session.
    denied = type(failure).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    denied = denied or _status_of(failure) in ("401", "403")
    return denied or isinstance(failure, PermissionError) or bool(_EXPIRED.search(str(failure)))


def errno_of(failure: BaseException) -> int:
    """Returns the errno of what a client has raised."""
    if isinstance(failure, OSError) and failure.errno is not None:
        return failure.errno
    if isinstance(failure, FileNotFoundError) or _status_of(failure) == "404":
        return errno.ENOENT
    for kind, number in _NUMBERS.items():
        if isinstance(failure, kind):
            return number
    if isinstance(failure, MemoryError):
        return errno.ENOMEM
    return errno.EACCES if is_denied(failure) else errno.EIO


def _status_of(failure: BaseException) -> str:
    match = _STATUS.search(str(failure))
    return match[1] if match else ""


def text_of(failure: BaseException) -> str:
    """Returns what a client has raised, as text without secrets."""
    # Not with its number.
    message = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
    # obstore adds the structure of its errors.
    text = " ".join(message.split()).partition(" Debug source:")[0]
    # The error of a bucket may repeat the token and the signed request.
    text = re.sub(r"(<\?xml[^>]*>\s*)?<Error\b.*", _xml_error, text).removesuffix(":")
    # Some messages have a URL with its signature, or its path alone.
    text = re.sub(r"(\w+://)[^\s/?#]*@", r"\1", text)
    text = re.sub(r"((?:\w+:/)?/[^\s?]*)\?\S+", r"\1", text)[:500]
    if text and isinstance(failure, OSError):
        return text  # the caller's error is of the same class
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__


def _xml_error(match: re.Match[str]) -> str:
    """Returns the code and the message of an error that a bucket answers."""
    found = [re.search(f"<{tag}>([^<]*)</{tag}>", match[0]) for tag in ("Code", "Message")]
    return ": ".join(tag[1] for tag in found if tag)
