"""The tensors in a directory: those of final files, or the chunks that the processes of a save have written.

Owns which files of a directory count, and reads boxes of elements from them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from .._arguments import Path, encode_input_path, path_text
from .._errors import SafetensorError, call
from .._load import open_file
from .._locations import RemotePath
from .._progress import Progress, run
from .._remote import named
from .._safe_open import open_path
from ._chunks import Box, check_boxes
from ._names import INDEX_SUFFIX, OFFSETS_KEY, POSITIONS_KEY, SHAPE_KEY, SUFFIX, is_chunk_file_name

# What load_sharded opens in a directory, even if there are other files.
_FIRST_CHOICE = [f"model{SUFFIX}"]

# How many files of a store are opened at once.
_OPENERS = 16

# A box to read: the path or the title of its file, the name of the tensor, the offsets in that file's tensor, and the
# target.
Request = tuple[str, str, Sequence[int], torch.Tensor]


@dataclass(slots=True)
class StoredTensor:
    """A tensor of a checkpoint, and where its elements are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    # Each box with the path of its file, or with the title if that is in a store.
    chunks: list[tuple[Box, str]] = field(default_factory=list)


class StoredTensors:
    """An open checkpoint. The final files count if there are some, otherwise those with the chunks of processes."""

    def __init__(self, path: Path | RemotePath) -> None:
        """Opens the checkpoint at ``path``: a directory, an index or a file; reads the headers.

        Raises:
            SafetensorError: no checkpoint, or an invalid file; chunks that overlap or leave a gap.
            OSError: a file is missing or cannot be read.
        """
        self._path = path if isinstance(path, RemotePath) else encode_input_path(path)
        self.tensors: dict[str, StoredTensor] = {}
        # By path: the native File, which has all tensors of that file.
        self._files: dict[str, Any] = {}
        try:
            self._add_all()
        except BaseException:
            self.close()
            raise

    def _add_all(self) -> None:
        names = self._list()
        files = sorted(name for name in names if name.endswith(SUFFIX) and not name.startswith("."))
        final = [name for name in files if not is_chunk_file_name(name)]
        if not files or any(name.endswith(INDEX_SUFFIX) for name in names):
            self._add_indexed(open_path(self._path, "mmap"))
        elif final:
            # torch's reader needs no index.
            for path_of_file, file in self._open(_FIRST_CHOICE if _FIRST_CHOICE[0] in final else final):
                self._add_whole(path_of_file, file)
            self._check_numbers(final)
        else:
            for path_of_file, file in self._open(files):
                self._add_chunks(path_of_file, file)
            self._check()

    def _list(self) -> list[str]:
        """Returns the names of the files in the directory; none if this is no directory."""
        if not isinstance(self._path, RemotePath):
            return [os.fsdecode(name) for name in os.listdir(self._path)] if os.path.isdir(self._path) else []
        title = self._path.title
        if title.endswith((SUFFIX, ".json")):
            return []
        store = self._path.store()
        try:
            return named(title, lambda: store.list(title)) or []
        except (FileNotFoundError, PermissionError):
            return []  # its default names can be tried

    def _open(self, names: list[str]) -> list[tuple[str, Any]]:
        """Opens files of the directory; returns each with its path."""
        if isinstance(self._path, RemotePath):
            paths = [self._path.join(name) for name in names]
            with ThreadPoolExecutor(_OPENERS) as threads:
                opened = list(threads.map(lambda path: open_file(path, "mmap"), paths))
            return [(path.title, file) for path, file in zip(paths, opened, strict=True)]
        local = [os.path.join(self._path, os.fsencode(name)) for name in names]
        return [(os.fsdecode(path), open_file(path, "mmap")) for path in local]

    def _path_of(self, name: str) -> str:
        """Returns the path of a file that the index names."""
        if isinstance(self._path, RemotePath):
            directory = self._path.title
            return f"{directory.rpartition('/')[0] if directory.endswith('.json') else directory.rstrip('/')}/{name}"
        directory = self._path if os.path.isdir(self._path) else os.path.dirname(self._path)
        return os.fsdecode(os.path.join(directory, os.fsencode(name)))

    def _add_indexed(self, file: Any) -> None:
        several = bool(call(file.shards))
        for name, like in _tensors_of(file):
            path = self._path_of(call(file.shard_of, name)) if several else _text(self._path)
            self._add(path, file, name, like)

    def _add_whole(self, path: str, file: Any) -> None:
        for name, like in _tensors_of(file):
            if name in self.tensors:
                raise SafetensorError(
                    f"{_title(path)}: tensor {name!r} is also in another file; remove the files of an older"
                    " checkpoint, or write an index"
                )
            self._add(path, file, name, like)

    def _add(self, path: str, file: Any, name: str, like: torch.Tensor) -> None:
        box = (0,) * like.dim(), tuple(like.shape)
        self.tensors[name] = StoredTensor(like.dtype, tuple(like.shape), [(box, path)])
        self._files[path] = file

    def _check_numbers(self, names: list[str]) -> None:
        """Checks that numbered files are all there."""
        for name in names:
            match = re.fullmatch(rf"(.+)-[0-9]{{5}}-of-([0-9]{{5}}){re.escape(SUFFIX)}", name)
            for number in range(1, int(match[2]) + 1) if match else ():
                other = f"{match[1]}-{number:05d}-of-{match[2]}{SUFFIX}"
                if other not in names:
                    raise SafetensorError(
                        f"{_title(_text(self._path))}: {name} is one of {int(match[2])} files, and {other} is missing;"
                        " fetch the checkpoint again, or save it again"
                    )

    def _add_chunks(self, path: str, file: Any) -> None:
        self._files[path] = file
        title = _title(path)
        try:
            positions = json.loads((call(file.metadata) or {})[POSITIONS_KEY])
            offsets = {name: tuple(map(int, entry[OFFSETS_KEY])) for name, entry in positions.items()}
            # Only our own writer stores shapes.
            shapes = {
                name: tuple(map(int, entry[SHAPE_KEY])) for name, entry in positions.items() if SHAPE_KEY in entry
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SafetensorError(
                f"{title}: its metadata has no valid {POSITIONS_KEY}, so it is not a file of"
                " torch.distributed.checkpoint; load it as it is"
            ) from error
        for name, like in _tensors_of(file):
            begin = offsets.get(name)
            if begin is None or len(begin) != like.dim() or min(begin, default=0) < 0:
                raise SafetensorError(
                    f"{title}: tensor {name!r}: {POSITIONS_KEY} does not have its position; save again"
                )
            end = tuple(start + size for start, size in zip(begin, like.shape, strict=True))
            shape = shapes.get(name, end)
            stored = self.tensors.setdefault(name, StoredTensor(like.dtype, shape))
            if stored.dtype != like.dtype or len(stored.shape) != like.dim():
                raise SafetensorError(
                    f"{title}: tensor {name!r}: another file has a chunk of another dtype or number of dimensions;"
                    " remove the files of an older checkpoint"
                )
            stored.shape = tuple(map(max, stored.shape, shape, end))
            stored.chunks.append(((begin, tuple(like.shape)), path))

    def _check(self) -> None:
        boxes = ((name, box) for name, stored in self.tensors.items() for box, _ in stored.chunks)
        try:
            check_boxes(self.tensors, boxes)
        except ValueError as error:
            raise SafetensorError(
                f"{_title(_text(self._path))}: {error}; a file is missing or of another save: save again"
            ) from None

    def is_remote(self) -> bool:
        """Returns whether the files are on a network filesystem."""
        return any(call(file.is_remote) for file in {id(file): file for file in self._files.values()}.values())

    def read(
        self,
        requests: Iterable[Request],
        progress: Progress = None,
    ) -> None:
        """Copies boxes of elements into tensors of their sizes, on any device, with any strides.

        Args:
            requests: the boxes.
            progress: as for load_file, once for each file, or for all final ones.
        """
        by_file: dict[int, tuple[Any, list[str], list[list[int]], list[torch.Tensor]]] = {}
        for path, name, offsets, target in requests:
            file = self._files[path]
            _, names, starts, targets = by_file.setdefault(id(file), (file, [], [], []))
            names.append(name)
            starts.append(list(offsets))
            targets.append(target)
        for file, names, starts, targets in by_file.values():
            run(call(file.start_fill, names, starts, targets), progress, "load")

    def read_box(self, name: str, box: Box, target: torch.Tensor) -> list[Request]:
        """Returns the requests that fill ``target`` with a box of a whole tensor."""
        requests: list[Request] = []
        for (begin, sizes), path in self.tensors[name].chunks:
            part = target
            offsets = []
            for dim, (start, size) in enumerate(zip(*box, strict=True)):
                first, last = max(start, begin[dim]), min(start + size, begin[dim] + sizes[dim])
                if first >= last and target.dim() > 0:
                    break
                part = part.narrow(dim, first - start, last - first)
                offsets.append(first - begin[dim])
            else:
                requests.append((path, name, offsets, part))
        return requests

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


def _text(path: bytes | RemotePath) -> str:
    return path.title if isinstance(path, RemotePath) else os.fsdecode(path)


def _title(path: str) -> str:
    return path_text(os.fsencode(path))


def _tensors_of(file: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Returns the names of the tensors of a native File, each with a tensor of its shape and dtype without memory."""
    names = call(file.offset_keys)
    return zip(names, call(file.get_tensors, names, torch.device("meta")), strict=True)
