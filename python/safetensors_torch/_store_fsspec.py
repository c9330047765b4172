"""The filesystems of fsspec."""

from __future__ import annotations

import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ._locations import title_of_url
from ._stores import Reader, Store, Writer, missing_client, part_bytes

# A read is tried again after errors that may pass, after 0.1, 0.2, 0.4 and 0.8 seconds.
_ATTEMPTS = 5
_FIRST_DELAY = 0.1

# How long what a filesystem says about a file counts.
_IDENTITY_SECONDS = 1.0
_IDENTITY_KEYS = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "created", "md5Hash")


class FsspecStore(Store):
    """A filesystem of fsspec."""

    def __init__(self, filesystem: Any, root: str = "", prefix: str = "", *, path: str = "") -> None:
        """Takes titles that begin with ``root``, and replaces that by ``prefix``. The user gave ``path``."""
        self._filesystem, self._root, self._prefix, self._given = filesystem, root, prefix, path

    @classmethod
    def of_url(cls, url: str) -> FsspecStore:
        try:
            from fsspec.core import url_to_fs

            filesystem, path = url_to_fs(url)
        except ImportError as error:
            if url.lower().startswith("hf:"):
                raise missing_client(url, "huggingface_hub", "safetensors-torch[hf]") from error
            raise ImportError(f"{title_of_url(url)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{title_of_url(url)}: no client reads such URLs: {error}") from None
        # The titles of files in the same directory differ in the last part.
        above = [text.rstrip("/").rpartition("/")[0] + "/" for text in (title_of_url(url), path)]
        return cls(filesystem, *above)

    def _path(self, title: str) -> str:
        path = self._prefix + title.removeprefix(self._root)
        if title != self._given and re.match(r"~|[^/]*:", path) and not self._prefix:
            # Beside the user's path, a name that an index has. fsspec would leave the directory.
            raise PermissionError(errno.EACCES, "the name of a shard must not be a URL or begin with ~")
        return path

    def open(self, title: str) -> Reader:
        return _File(self._filesystem, self._path(title))

    def list(self, directory: str) -> list[str] | None:
        path = self._path(directory).rstrip("/")
        self._filesystem.invalidate_cache(path)
        found = self._filesystem.ls(path, detail=True)
        return [entry["name"].rpartition("/")[2] for entry in found if entry["type"] != "directory"]

    def create(self, title: str, nbytes: int) -> Writer:
        return _NewFile(self._filesystem, self._path(title), nbytes)

    def remove(self, title: str) -> None:
        try:
            self._filesystem.rm_file(self._path(title))
        except FileNotFoundError:
            pass


class _File:
    """A file that is read."""

    max_requests = 0

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._lock = threading.Lock()
        self._identity: tuple[float, str | None] = 0.0, None

    def _info(self) -> dict[str, Any]:
        self._filesystem.invalidate_cache(self._path)
        return self._filesystem.info(self._path)

    def length(self) -> int:
        info = _retried(self._info)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        return info["size"]

    def identity(self) -> str | None:
        with self._lock:
            since, identity = self._identity
            if identity is None or time.monotonic() - since > _IDENTITY_SECONDS:
                info = _retried(self._info)
                identity = " ".join(f"{key}={info[key]}" for key in _IDENTITY_KEYS if key in info)
                self._identity = time.monotonic(), identity
            return identity

    def read(self, offset: int, nbytes: int) -> Iterator[Any]:
        if offset == 0:
            # An index is read again once its files are open: an earlier answer would hide that it was replaced.
            with self._lock:
                self._identity = 0.0, None

        def read() -> Any:
            data = self._filesystem.cat_file(self._path, start=offset, end=offset + nbytes)
            if len(data) != nbytes:
                raise ConnectionError(f"{len(data)} of {nbytes} bytes arrived")
            return data

        yield _retried(read)


class _NewFile:
    """A file that is written."""

    def __init__(self, filesystem: Any, path: str, nbytes: int) -> None:
        from fsspec.spec import AbstractBufferedFile

        self._filesystem, self._path = filesystem, path
        directory, _, name = path.rpartition("/")
        if directory:
            filesystem.makedirs(directory, exist_ok=True)
        part = part_bytes(nbytes)
        self._hidden: str | None = f"{directory}/.{name}.{secrets.token_hex(8)}.tmp"
        self._file = filesystem.open(self._hidden, "wb", block_size=part)
        if isinstance(self._file, AbstractBufferedFile):
            # Such a file appears when it is closed, so it needs no hidden name. Nothing is sent yet.
            self._file.closed = True
            self._hidden = None
            self._file = filesystem.open(path, "wb", block_size=part)

    def write(self, data: Any) -> Any:
        return self._file.write(data)

    def commit(self) -> None:
        self._file.close()
        if self._hidden is not None:
            _move(self._filesystem, self._hidden, self._path)

    def abort(self) -> None:
        if self._hidden is None:
            self._file.discard()
            self._file.closed = True  # closing it would send the rest
            # huggingface_hub collects the bytes in a local file.
            if temporary := getattr(self._file, "temp_file", None):
                temporary.close()
                os.unlink(temporary.name)
        else:
            self._file.close()
            self._filesystem.rm_file(self._hidden)


def _move(filesystem: Any, source: str, target: str) -> None:
    """Renames a file."""
    from fsspec.spec import AbstractFileSystem

    if type(filesystem).mv is AbstractFileSystem.mv:
        # It copies too, and takes brackets in names for patterns.
        filesystem.cp_file(source, target)
        filesystem.rm_file(source)
    else:
        filesystem.mv(source, target)


def _retried(function: Callable[[], Any]) -> Any:
    """Calls a function, again after errors that may pass."""
    for attempt in range(_ATTEMPTS):
        try:
            return function()
        except Exception as failure:
            passing = isinstance(failure, (ConnectionError, TimeoutError))
            # Those of aiohttp, which is not imported here.
            passing = passing or type(failure).__name__ in ("ClientError", "ServerDisconnectedError")
            if attempt + 1 == _ATTEMPTS or not passing:
                raise
            time.sleep(_FIRST_DELAY * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
