"""Paths that are not local: URLs, and paths in a filesystem that the user gives."""

from __future__ import annotations

import os
import re
from typing import Any

from ._exceptions import os_error

# The schemes of buckets.
BUCKETS = ("s3", "s3a", "gs", "az", "abfs", "abfss")


def is_url(filename: Any) -> bool:
    """Returns whether this is a URL of a file that is not local, and not the name of a local file."""
    if not isinstance(filename, str):
        return False
    scheme, found, rest = filename.partition("://")
    if not found or not rest or scheme.lower() == "file":
        return False
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme) is not None and not os.path.lexists(f"{scheme}:")


def title_of_url(url: str) -> str:
    """Returns a URL without what may be a secret: the user, and the query."""
    if url.lower().startswith("abfs"):
        return url  # a filesystem is before the @
    return re.sub(r"//[^/?#]*@", "//", split_query(url)[0])


def split_query(url: str) -> tuple[str, str]:
    """Returns a URL without its query, and the query. The keys of a bucket may have question marks."""
    if url.partition("://")[0].lower() in BUCKETS:
        return url, ""
    path, found, query = url.partition("?")
    return path, found + query


class RemotePath:
    """A URL, or a path in a store of obstore or a filesystem of fsspec."""

    def __init__(self, path: str, filesystem: Any = None) -> None:
        self.path, self.filesystem = path, filesystem

    @property
    def title(self) -> str:
        """The path for messages, without what may be a secret."""
        return title_of_url(self.path) if self.filesystem is None else self.path

    def store(self) -> Any:
        """Returns the Store that has the file.

        Raises:
            ImportError, ValueError, TypeError: as store_of.
            OSError: the client cannot be made.
        """
        from ._stores import errno_of, store_of, text_of  # not above: few programs use URLs

        try:
            return store_of(self.path, self.filesystem)
        except (ImportError, ValueError, TypeError):
            raise
        except Exception as failure:
            raise os_error(errno_of(failure), f"{self.title}: {text_of(failure)}") from None

    def join(self, name: str) -> RemotePath:
        """Returns the path of a file in this directory."""
        path, query = split_query(self.path) if self.filesystem is None else (self.path, "")
        return RemotePath(f"{path.rstrip('/')}/{name}{query}" if path else name, self.filesystem)

    def __repr__(self) -> str:
        return repr(self.title)


def located(filename: Any, filesystem: Any = None) -> Any:
    """Returns a RemotePath for a URL, and for any path if a filesystem is given; a local path as it is.

    Raises:
        TypeError: with a filesystem, ``filename`` is not a path.
        ValueError: a URL, or a path in a filesystem, contains a null byte.
    """
    if isinstance(filename, RemotePath):
        return filename
    if filesystem is not None:
        path = os.fspath(filename) if isinstance(filename, os.PathLike) else filename
        if not isinstance(path, str):
            raise TypeError(f"a path in a filesystem must be a str, not {type(filename).__name__}")
    elif is_url(filename):
        path = filename
    else:
        return filename
    if "\0" in path:
        raise ValueError(f"embedded null byte in the path {path[:200]!r}")
    return RemotePath(path, filesystem)
