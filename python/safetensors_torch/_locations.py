"""Paths that are not local: URLs, and paths in a filesystem that the user gives."""

from __future__ import annotations

import os
import re
from typing import Any

from ._stores import Store, split_query, store_of, title_of_url


def is_url(filename: Any) -> bool:
    """Returns whether this is a URL of a file that is not local, and not the name of a local file."""
    if not isinstance(filename, str):
        return False
    scheme, found, rest = filename.partition("://")
    is_name = re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme) is not None and scheme.lower() != "file"
    return bool(found and rest) and is_name and not os.path.lexists(f"{scheme}:")


class RemotePath:
    """A URL, or a path in a store of obstore or a filesystem of fsspec."""

    def __init__(self, path: str, filesystem: Any = None) -> None:
        self.path, self.filesystem = path, filesystem

    @property
    def title(self) -> str:
        """The path for messages, without what may be a secret."""
        return title_of_url(self.path) if self.filesystem is None else self.path

    def store(self) -> Store:
        """Returns the store that has the file.

        Raises:
            ImportError, ValueError, TypeError: as store_of.
        """
        return store_of(self.path, self.filesystem)

    def join(self, name: str) -> RemotePath:
        """Returns the path of a file in this directory."""
        path, query = split_query(self.path) if self.filesystem is None else (self.path, "")
        return RemotePath(f"{path.rstrip('/')}/{name}{query}", self.filesystem)

    def __repr__(self) -> str:
        return repr(self.title)


def located(filename: Any, filesystem: Any = None) -> Any:
    """Returns a RemotePath for a URL, and for any path if a filesystem is given; a local path as it is.

    Raises:
        TypeError: with a filesystem, ``filename`` is not a path.
    """
    if isinstance(filename, RemotePath):
        return filename
    if filesystem is not None:
        path = os.fspath(filename) if isinstance(filename, os.PathLike) else filename
        if not isinstance(path, str):
            raise TypeError(f"a path in a filesystem must be a str, not {type(filename).__name__}")
        return RemotePath(path, filesystem)
    return RemotePath(filename) if is_url(filename) else filename
