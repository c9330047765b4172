"""One checkpoint that several processes write: each its chunks, at their places in the final files.

Owns the steps: one process creates the files under hidden names, all write, and that one puts them in place.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .._arguments import encode_path
from .._errors import call
from .._progress import Progress, run
from .._save_checks import DisableTorchFunction
from ._chunks import Chunk

_native = torch.classes.safetensors_torch

# Smaller numbers are those of other staged files of the process.
_FIRST_NUMBER = 1 << 32


@dataclass(frozen=True, slots=True)
class HiddenFiles:
    """What a process has to know to write its part: the hidden name of each file, and the file of each tensor."""

    names: list[str]
    file_of: dict[str, int]


class JoinedCheckpoint:
    """The files of a checkpoint that other processes fill. Dropped before commit, it leaves the directory as it was."""

    def __init__(
        self,
        directory: Any,
        tensors: Mapping[str, Chunk],
        metadata: Mapping[str, str],
        *,
        max_shard_size: int,
        files: Mapping[str, int] | None = None,
        first_number: int | None = None,
        durable: bool = False,
    ) -> None:
        """Creates the files, of exactly their size, with their headers.

        Args:
            directory: created if it is missing.
            tensors: one chunk of each, by name, in the order in which they are divided into files.
            metadata: for each file.
            max_shard_size: as for save_sharded, in bytes.
            files: the number of each tensor's file, from 1 on, instead of a size. Names of other tensors may be in it;
                numbers without a tensor are left out.
            first_number: determines the hidden names, in this process.
            durable: whether commit returns only after all files are on the disk.

        Raises:
            ValueError: a tensor without a file.
            What save_sharded raises.
        """
        arguments = layout_arguments(encode_path(directory), tensors, metadata, max_shard_size, files)
        if first_number is None:
            first_number = new_first_number()
        with _disable_current_modes(), DisableTorchFunction():
            self._native = call(_native.JoinedCheckpoint, *arguments, first_number, durable)
        self.hidden = HiddenFiles(
            call(self._native.hidden_names), dict(zip(tensors, call(self._native.files), strict=True))
        )

    def commit(self) -> list[str]:
        """Puts the files in place once every process has written its chunks. Returns their names, the index last."""
        run(self._native, None, "save")
        return call(self._native.result)

    def cancel(self) -> None:
        self._native.cancel()


def layout_arguments(
    directory: bytes,
    tensors: Mapping[str, Chunk],
    metadata: Mapping[str, str],
    max_shard_size: int,
    files: Mapping[str, int] | None,
) -> tuple[Any, ...]:
    """Returns the arguments of a native CheckpointLayout, from those of JoinedCheckpoint."""
    missing = [] if files is None else [name for name in tensors if name not in files]
    if missing:
        raise no_file(missing[0])
    numbers = [] if files is None else [files[name] - 1 for name in tensors]
    with _disable_current_modes(), DisableTorchFunction():
        specs = [torch.empty(chunk.shape, dtype=chunk.dtype, device="meta") for chunk in tensors.values()]
    return list(tensors), specs, {"format": "pt", **metadata}, directory, "model", max_shard_size, numbers


def no_file(name: str) -> ValueError:
    """Returns the error about a tensor that a mapping of names to files lacks."""
    return ValueError(f"no file for tensor {name!r}: give each tensor the number of its file")


def new_first_number() -> int:
    """Returns a number that determines hidden names which no other save of this process has."""
    return _FIRST_NUMBER + (secrets.randbits(31) << 20)


def write_chunks(
    directory: Any,
    hidden: HiddenFiles,
    chunks: Sequence[tuple[Chunk, torch.Tensor]],
    *,
    start: int = 0,
    durable: bool = False,
    progress: Progress = None,
) -> None:
    """Writes chunks to the hidden files in ``directory``, file by file.

    Args:
        start: the number of the file to begin with: processes that begin with different ones do not wait for each
            other.
        progress: as for save_file; it counts the bytes of all files.

    Raises:
        OSError: a file cannot be opened or written.
        SafetensorError: a file has no such tensor.
    """
    by_file: dict[int, list[tuple[Chunk, torch.Tensor]]] = {}
    for chunk, tensor in chunks:
        if 0 not in chunk.sizes:
            by_file.setdefault(hidden.file_of[chunk.name], []).append((chunk, tensor))
    total = sum(chunk.nbytes for chunk, _ in chunks)
    done = 0
    for number in sorted(by_file, key=lambda file: (file - start) % len(hidden.names)):
        mine = by_file.pop(number)
        path = os.path.join(encode_path(directory), hidden.names[number].encode())
        with _disable_current_modes(), DisableTorchFunction():
            parts = [tensor.to(chunk.dtype) for chunk, tensor in mine]
            starts = [list(chunk.offsets) for chunk, _ in mine]
            save = call(_native.JoinedSave, path, [chunk.name for chunk, _ in mine], parts, starts, durable)
            report = progress
            if callable(progress):
                before, header = done, call(save.total) - sum(chunk.nbytes for chunk, _ in mine)

                def report(bytes_done: int, _: int, before: int = before, header: int = header) -> Any:
                    return progress(min(before + max(bytes_done - header, 0), total), total)

            run(save, report, "save")
        done += sum(chunk.nbytes for chunk, _ in mine)
