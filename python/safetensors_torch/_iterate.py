"""iterate: the tensors of several files, one after the other, within a memory budget."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ._arguments import Device, Dtype, Path, check_dtype, title_of, to_device
from ._errors import NamedFile, SafetensorError, call, names_instead, short_repr
from ._keywords import explains_keywords
from ._load import Names, select
from ._locations import RemotePath, located
from ._prefetch_loader import landed, start
from ._progress import Progress, ProgressBar, check_progress
from ._safe_open import open_path
from ._sharded import parse_size
from ._tracing import dynamo_disable

# More threads than a loader starts.
_MOST_THREADS = 64

# How many files that are not local are opened at once.
_MOST_OPEN = 16


@dynamo_disable
@explains_keywords
def iterate(
    files: Path | Iterable[Path],
    device: Device = "cpu",
    *,
    backend: str = "mmap",
    dtype: Dtype = None,
    names: Names = None,
    buffer_bytes: int | str | None = "256MiB",
    progress: Progress = None,
    filesystem: Any = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of one file or several, while threads read the next ones.

    Files come in the given order, and their tensors about in that of their data: each is yielded once it has landed.
    The next file is read while the last tensors of the one before are used. Reading starts with the call, and ends
    with the iteration, or when the iterator is closed or dropped. If several processes read the same files from a
    slow filesystem, let each begin with another one: ``files[rank:] + files[:rank]``.

    Args:
        files: a path or a URL, or several of them. Each is a file, an index or a directory, as for safe_open.
        device: the device of the tensors, as for load_file. CPU tensors have memory of their own, with either backend.
        backend: "mmap" or "pread": how files are opened, as for load_file. With "pread", all of them stay open.
        dtype: the dtype to convert floating-point tensors to, as for load_file.
        names: the tensors to read, as for load_file. At least one file must have each name.
        buffer_bytes: the most bytes of tensors that are read ahead, as a number or text ("256MiB"), including the
            tensor that was yielded last. If none waits to be yielded, the next one is read even if it does not fit.
            None reads everything ahead.
        progress: a bar or a function, as for load_file: it is called with the bytes that were yielded.
        filesystem: what ``files`` are in, as for load_file.

    Raises:
        SafetensorError, OSError, MemoryError, torch.OutOfMemoryError, ValueError, TypeError, RuntimeError, ImportError:
            as load_file and safe_open. The call raises errors about headers and arguments, the iteration those of
            reading.

    Example:
        >>> save_file({"a": torch.zeros(1), "b": torch.ones(2)}, path)
        >>> for name, tensor in iterate([path]):
        ...     print(name, tensor.tolist())
        a [0.0]
        b [1.0, 1.0]
    """
    target, to_dtype, progress = to_device(device), check_dtype(dtype), check_progress(progress)
    most_bytes = None if buffer_bytes is None else parse_size(buffer_bytes)
    given = [files] if isinstance(files, (str, bytes, os.PathLike)) else list(files)
    paths = [located(path, filesystem) for path in given]
    opened = open_paths(paths, backend)
    title = ", ".join(title_of(path) for path in paths[:3])
    chosen = select_of_files(opened, names, title)
    with NamedFile(title):
        native = start(opened, chosen, [[]] * len(opened), target, to_dtype, most_bytes, _MOST_THREADS)
    tensors = _iterate(native, progress)
    # A generator that has started closes the loader when it is dropped.
    next(tensors)
    return tensors


def open_paths(paths: list[Any], backend: str) -> list[Any]:
    """Opens the native File of each path; several that are not local at once."""
    if len(paths) < 2 or not any(isinstance(path, RemotePath) for path in paths):
        return [open_path(path, backend) for path in paths]
    with ThreadPoolExecutor(_MOST_OPEN) as pool:
        return list(pool.map(lambda path: open_path(path, backend), paths))


def _iterate(native: Any, progress: Progress) -> Iterator[Any]:
    """Yields None, then names and tensors."""
    try:
        yield None
        with ProgressBar("load", progress is True) as bar:
            yield from landed(native, bar if progress is True else progress or None)
    finally:
        call(native.close)


def select_of_files(opened: list[Any], names: Names, title: str) -> list[list[str] | None]:
    """Returns the names to read of each file, each of which has them; None means all.

    Raises:
        SafetensorError: no file has one of the names, or a match of one of the globs; there are names but no files.
        TypeError: as select().
    """
    if names is None or callable(names) or not isinstance(names, Iterable) or isinstance(names, (str, bytes)):
        return [select(file, names) for file in opened]
    chosen: list[dict[str, None]] = [{} for _ in opened]
    for name in names:
        matches = [[one for one in select(file, [name]) or () if call(file.contains, one)] for file in opened]
        if not opened:
            raise SafetensorError(f"files: no file is given, so none has a tensor {short_repr(name)}; pass its path")
        if not any(matches):
            known = [one for file in opened for one in call(file.keys)]
            raise SafetensorError(f"{title}: no tensor is called {short_repr(name)}; {names_instead(name, known)}")
        for found, match in zip(chosen, matches, strict=True):
            found.update(dict.fromkeys(match))
    return [list(found) for found in chosen]
