"""The targets of convert: a file, or a checkpoint of several files. A few tensors are written at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .._arguments import encode_path
from .._errors import call
from .._incremental_writer import IncrementalWriter
from .._progress import ProgressBar, run
from .._sharded import parse_size

Specs = dict[str, torch.Tensor]
Read = Callable[[list[str]], list[torch.Tensor]]

# The bytes of tensors that are read and converted at a time.
_BATCH = 64 << 20


class Options(NamedTuple):
    """The options of the command line for the target."""

    metadata: dict[str, str]
    durable: bool
    bar: bool
    """Whether to show a bar."""


def write_file(specs: Specs, read: Read, path: str, options: Options) -> list[str]:
    """Writes the tensors that ``specs`` declares and ``read`` returns into a file. Returns its path in a list."""
    done, total = 0, sum(spec.nbytes for spec in specs.values())
    with (
        ProgressBar("convert", options.bar) as report_progress,
        IncrementalWriter(path, specs, options.metadata, durable=options.durable) as writer,
    ):
        for names in _batches(specs):
            for name, tensor in zip(names, read(names), strict=True):
                writer.write(name, tensor)
                done += tensor.nbytes
                report_progress(done, total)
    return [path]


def write_directory(specs: Specs, read: Read, path: str, max_shard_size: int | str, options: Options) -> list[str]:
    """Writes them as a checkpoint, as save_sharded does, and returns the paths of the files.

    At most one of its files is in memory at a time.
    """
    native = torch.classes.safetensors_torch.ShardedWriter
    size = parse_size(max_shard_size)
    writer = call(native, list(specs), list(specs.values()), options.metadata, encode_path(path), "model", size)
    done, total = 0, sum(spec.nbytes for spec in specs.values())
    with ProgressBar("convert", options.bar) as report_progress:
        try:
            for names in call(writer.members):
                call(writer.start, read(names))
                run(writer, None, "save")
                done += sum(specs[name].nbytes for name in names)
                report_progress(done, total)
            call(writer.start_commit, options.durable)
            run(writer, None, "save")
            return [os.path.join(path, name) for name in call(writer.result)]
        finally:
            writer.cancel()


def _batches(specs: Specs) -> Iterator[list[str]]:
    names: list[str] = []
    nbytes = 0
    for name, spec in specs.items():
        if names and nbytes + spec.nbytes > _BATCH:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += spec.nbytes
    yield names
