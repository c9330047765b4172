"""Places other than local directories: URLs, and directories in stores of obstore and filesystems of fsspec."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import obstore
import pytest
from obstore.store import LocalStore, MemoryStore, S3Store, from_url

KINDS = (
    "s3://",
    "memory://",
    "obstore memory",
    "obstore local",
    "obstore s3",
    "fsspec memory",
    "fsspec file",
    "fsspec dir",
)


class Place(NamedTuple):
    """A directory.

    root: its path or URL.
    filesystem: what it is in; None for a URL.
    files: returns the bytes of all files in it by their names.
    """

    root: str
    filesystem: Any
    files: Callable[[], dict[str, bytes]]

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"


def make_place(kind: str, request: pytest.FixtureRequest) -> Place:
    """Returns a new, empty place."""
    tmp_path: Path = request.getfixturevalue("tmp_path") / "place"
    name = f"directory-{uuid.uuid4().hex}"
    if "s3" in kind:
        bucket = request.getfixturevalue("bucket")
        found = _objects(from_url(bucket), name)
        return Place(f"{bucket}/{name}", None, found) if kind == "s3://" else Place(name, _store(bucket), found)
    if kind == "obstore memory":
        store = MemoryStore()
        return Place(name, store, _objects(store, name))
    if kind == "obstore local":
        return Place(name, LocalStore(tmp_path, mkdir=True), _local(tmp_path / name))
    if "memory" in kind:
        memory = fsspec.filesystem("memory")

        def found() -> dict[str, bytes]:
            return {path.removeprefix(f"/{name}/"): memory.cat_file(path) for path in memory.find(f"/{name}")}

        return Place(f"memory://{name}", None, found) if kind == "memory://" else Place(f"/{name}", memory, found)
    if kind == "fsspec file":
        return Place(str(tmp_path), fsspec.filesystem("file"), _local(tmp_path))
    return Place(
        name, fsspec.filesystem("dir", path=str(tmp_path), fs=fsspec.filesystem("file")), _local(tmp_path / name)
    )


def _store(bucket: str) -> S3Store:
    return S3Store(bucket.removeprefix("s3://"))


def _objects(store: Any, prefix: str) -> Callable[[], dict[str, bytes]]:
    def files() -> dict[str, bytes]:
        paths = [entry["path"] for entry in obstore.list(store, prefix).collect()]
        return {path.removeprefix(f"{prefix}/"): bytes(obstore.get(store, path).bytes()) for path in paths}

    return files


def _local(directory: Path) -> Callable[[], dict[str, bytes]]:
    return lambda: local_files(directory)


def local_files(directory: Path) -> dict[str, bytes]:
    """Returns the bytes of all files in a directory by their names, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
