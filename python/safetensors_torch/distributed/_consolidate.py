"""consolidate: whole tensors from the files that the processes of torch.distributed.checkpoint have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._arguments import Path, check_bool, check_int, check_name, encode_input_path, encode_path
from .._errors import call
from .._keywords import explains_keywords
from .._progress import Progress, check_progress, run
from .._sharded import parse_size
from ._group import Group


@explains_keywords
def consolidate(
    input: Path,  # noqa: A002 - the name of what it is
    output: Path,
    *,
    max_shard_size: int | str = "5GB",
    fqn_to_index_mapping: Mapping[str, int] | None = None,
    durable: bool = False,
    process_group: Any = None,
    progress: Progress = None,
) -> list[str]:
    """Joins the files ``shard-*.safetensors`` of a directory into a checkpoint of whole tensors, sorted by name.

    Reads and writes each byte once, in a time that is linear in the number of tensors. The files of ``input`` stay. The
    old checkpoint in ``output`` stays until the new one is complete.

    Args:
        input: the directory that HuggingFaceStorageWriter, or torch's, has saved to with the layout "shards".
        output: the directory for the checkpoint, created if it is missing.
        max_shard_size: the most bytes of tensors in one file, as for save_sharded.
        fqn_to_index_mapping: the number of each tensor's file, from 1 on, instead of a size. Names that no tensor has
            are ignored, and numbers without a tensor left out. The files are then numbered, and have an index, even if
            there is one.
        durable: whether to return only after all files are on the disk, as for save_file.
        process_group: the processes that call this together; the first one consolidates, the others wait. By default
            this process alone.
        progress: as for save_file, in the process that consolidates.

    Returns:
        The names of the files, the index last.

    Raises:
        SafetensorError: ``input`` has no such files; one of them is invalid or of another save; a tensor whose chunks
            overlap or leave a gap; a tensor without a file.
        OSError: a file cannot be read or written. ``output`` is then as it was.
        ValueError, TypeError, ImportError: as save_sharded.
        RuntimeError: another process has failed; the error names it.

    Example:
        >>> consolidate("checkpoints/step-1000/sharded", "checkpoints/step-1000")
        ['model.safetensors']
    """

    def work() -> list[str]:
        return _consolidate(input, output, max_shard_size, fqn_to_index_mapping, durable, progress)

    return work() if process_group is None else Group(process_group).first("consolidating a checkpoint", work)


def _consolidate(
    input: Path,  # noqa: A002
    output: Path,
    max_shard_size: int | str,
    mapping: Mapping[str, int] | None,
    durable: bool,
    progress: Progress,
) -> list[str]:
    check_bool(durable, "durable")
    progress = check_progress(progress)
    if mapping is not None and not mapping:
        raise ValueError("fqn_to_index_mapping is empty; give each tensor the number of its file, or None")
    names, files = [], []
    for name, number in (mapping or {}).items():
        check_name(name)
        names.append(name)
        files.append(check_int(number, f"the file of tensor {name!r}"))
    pending = call(
        torch.classes.safetensors_torch.PendingConsolidation,
        encode_input_path(input),
        encode_path(output),
        names,
        files,
        parse_size(max_shard_size),
        durable,
    )
    run(pending, progress, "consolidate")
    return call(pending.result)
