"""load_sharded and save_sharded: checkpoints of several files and their index, as Hugging Face's tools have them.

Owns the arguments of Python. What a path means, how tensors are divided, what the files are called, and whether an
index fits its files, the native library decides.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ._arguments import (
    Device,
    Path,
    check_bool,
    check_dtype,
    check_variant,
    encode_path,
    to_device,
    to_keyword,
)
from ._errors import call, short_repr
from ._load import Names, bring_in, load_file, load_in_steps, select
from ._progress import STEP_SECONDS, Progress, check_progress
from ._save import check_rules, write
from ._save_checks import DisableTorchFunction, check_tensors
from ._tracing import dynamo_disable, is_traced

_ops = torch.ops.safetensors_torch
_plan_sharded_save = _ops._plan_sharded_save.default
_PendingFile = torch.classes.safetensors_torch.PendingFile

_UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
_UNITS.update({unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)})


def open_checkpoint(path: Path, backend: str, variant: str | None = None, extra: str = "error") -> Any:
    """The native File over the files of the checkpoint at ``path``; the arguments are those of load_sharded."""
    arguments = (encode_path(path), to_keyword(backend), check_variant(variant), to_keyword(extra))
    pending = call(_PendingFile, *arguments)
    while not call(pending.advance, STEP_SECONDS):
        pass
    return call(pending.result)


@dynamo_disable
def load_sharded(
    path: Path,
    device: Device = "cpu",
    *,
    backend: str = "mmap",
    prefault: bool | None = None,
    dtype: torch.dtype | None = None,
    names: Names = None,
    variant: str | None = None,
    extra: str = "error",
    progress: Progress = None,
) -> dict[str, torch.Tensor]:
    """Loads the tensors of a checkpoint: of one file, or of several that an index lists.

    The index is checked against its files before a tensor is read: they hold the tensors that it lists, where it says
    so, and no others unless ``extra`` allows them, and it names no file outside its directory.

    Args:
        path: a directory, an index (a name that ends in ``.json``), or a file; str, bytes or os.PathLike. In a
            directory ``model.safetensors`` counts first, then ``model.safetensors.index.json``, as in transformers,
            then the only checkpoint of another name.
        device: where the tensors shall be, as for load_file.
        backend: how the files are read, as for load_file.
        prefault: what becomes of mapped pages before they are touched, as for load_file.
        dtype: what floating-point tensors are converted to, as for load_file.
        names: which tensors to load, as for load_file; files that have none of them are not read.
        variant: which checkpoint of a directory: "fp16" loads ``model.fp16.safetensors``,
            ``model.safetensors.index.fp16.json`` and the other names that diffusers and transformers use.
        extra: what is done about tensors that the files hold and the index does not list: "error" refuses the
            checkpoint, "ignore" leaves them out.
        progress: who is told how far it is, as for load_file.

    Returns:
        The tensors by name, file after file, each in the order of its data.

    Raises:
        SafetensorError: an index that is malformed, names a file outside its directory, or does not fit its files; a
            directory without a checkpoint, or with several; a variant of a path that is a file; and what load_file
            raises, for each file.
        OSError: a file that is missing, or cannot be read.
        MemoryError, torch.OutOfMemoryError, ValueError, TypeError, RuntimeError, ImportError: as load_file.

    Example:
        >>> names = save_sharded({"a": torch.zeros(3), "b": torch.ones(2)}, directory, max_shard_size=12)
        >>> names
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']
        >>> load_sharded(directory, names=["b"])
        {'b': tensor([1., 1.])}
    """
    if prefault is not None:
        check_bool(prefault, "prefault")
    target, dtype, progress = to_device(device), check_dtype(dtype), check_progress(progress)
    file = open_checkpoint(path, backend, variant, extra)
    return load_opened(file, path, target, backend, prefault, dtype, names, progress)


def load_opened(
    file: Any,
    path: Path,
    device: torch.device,
    backend: str,
    prefault: bool | None = None,
    dtype: torch.dtype | None = None,
    names: Names = None,
    progress: Progress = None,
) -> dict[str, torch.Tensor]:
    """load_sharded of a checkpoint that is open, of the native File over what is at ``path``."""
    if is_traced():
        return _load_file_by_file(file, encode_path(path), select(file, names), device, backend, prefault, dtype)
    bring_in(file, device, backend, prefault, names)
    return load_in_steps(file, device, dtype, names, progress)


def _load_file_by_file(
    file: Any,
    path: bytes,
    names: list[str] | None,
    device: torch.device,
    backend: str,
    prefault: bool | None,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """The same by operators that a mode of torch's can see."""
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    wanted = call(file.offset_keys) if names is None else names
    tensors: dict[str, torch.Tensor] = {}
    for shard in call(file.shards):
        here = [name for name in wanted if call(file.shard_of, name) == shard]
        if here:
            one = os.path.join(directory, os.fsencode(shard))
            tensors.update(load_file(one, device, backend=backend, prefault=prefault, dtype=dtype, names=here))
    return tensors


@dynamo_disable
def save_sharded(
    tensors: dict[str, torch.Tensor],
    directory: Path,
    metadata: dict[str, str] | None = None,
    *,
    max_shard_size: int | str = "5GB",
    stem: str = "model",
    force_contiguous: bool = False,
    shared: str = "error",
    durable: bool = False,
    progress: Progress = None,
) -> list[str]:
    """Saves tensors as a checkpoint in a directory: one file, or several and their index.

    Names, index and division are those of Hugging Face's tools: tensors go into the files in their order, and a new
    file begins before the tensor with which it would pass the size. A checkpoint of the same stem that is there is
    replaced as a whole; docs/saving.md says how, and what a process that is killed leaves.

    Args:
        tensors: the tensors by name, as for save_file.
        directory: where the files go; made if it is not there. str, bytes or os.PathLike.
        metadata: text to store in the header of each file. ``format`` = ``pt``, which Hugging Face's tools want, is
            added unless it is there.
        max_shard_size: the most bytes of tensors in one file, as a number or with a unit ("5GB", "500MB", "2GiB"); a
            tensor that is larger has a file of its own.
        stem: what the names of the files begin with.
        force_contiguous: what becomes of tensors that are not contiguous, as for save_file.
        shared: what becomes of tensors that share memory, as for save_file.
        durable: whether to return only once everything is on the disk, as for save_file.
        progress: who is told how far it is, as for save_file.

    Returns:
        The names of the files, the index last.

    Raises:
        ValueError: a size that is none, or less than 1; and what save_file raises.
        SafetensorError: a stem that no file name can begin with; and what save_file raises.
        RuntimeError, TypeError, UnicodeEncodeError, OSError: as save_file.

    Nothing is written if a check fails, and a directory keeps its checkpoint until all new files are complete.

    Example:
        >>> save_sharded({"a": torch.zeros(3)}, directory)
        ['model.safetensors']
    """
    check_bool(durable, "durable")
    progress, rules, size = check_progress(progress), check_rules(force_contiguous, shared), parse_size(max_shard_size)
    if not isinstance(stem, str):
        raise TypeError(f"stem must be a str, not {type(stem).__name__}")
    tensors, metadata = check_tensors(tensors, metadata, **rules)
    entries = {"format": "pt", **(metadata or {})}
    with _disable_current_modes():
        with DisableTorchFunction():
            plan = call(_plan_sharded_save, tensors, entries, encode_path(directory), stem, size, **rules)
        write(plan, progress, plan.start, durable)
        return call(plan.file_names)


def parse_size(size: int | str) -> int:
    """A number of bytes, given as one or as text with a unit: powers of 1000 ("5GB") or of 1024 ("5GiB").

    Raises:
        ValueError: text that is no such size, or less than 1 byte.
        TypeError: neither.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"a size is a number of bytes or a str such as '5GB', not {type(size).__name__}")
    if isinstance(size, int):
        parsed = size
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", size)
        factor = _UNITS.get(match[2].upper() or "B") if match else None
        if match is None or factor is None:
            raise ValueError(
                f"{short_repr(size)} is no size: give bytes as a number, or with a unit, such as '5GB' or '500MiB'"
            )
        parsed = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if not 1 <= parsed < 1 << 63:
        raise ValueError(f"{short_repr(size)} is no size that a file can have: give 1 byte or more, such as '5GB'")
    return parsed
