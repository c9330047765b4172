"""load_sharded and save_sharded: checkpoints of several files and their index, in the layout of Hugging Face's tools.

Owns the arguments. The native library resolves paths, divides the tensors into files, and checks an index.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ._arguments import (
    Device,
    Dtype,
    Path,
    check_bool,
    check_dtype,
    check_variant,
    encode_input_path,
    encode_path,
    title_of,
    to_device,
    to_keyword,
)
from ._errors import NamedFile, call, short_repr
from ._keywords import explains_keywords
from ._load import Names, load_file, load_in_steps, select
from ._locations import RemotePath, located
from ._progress import Progress, check_progress, run
from ._save import check_rules
from ._save_checks import DisableTorchFunction, check_tensors
from ._tracing import dynamo_disable, is_traced

_PendingFile = torch.classes.safetensors_torch.PendingFile
_PendingShardedSave = torch.classes.safetensors_torch.PendingShardedSave

_UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
_UNITS.update({unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)})


def open_checkpoint(path: Path | RemotePath, backend: str, variant: str | None = None, extra: str = "error") -> Any:
    """Opens the native File over the checkpoint at ``path``; the arguments are those of load_sharded."""
    if isinstance(path, RemotePath):
        from . import _remote

        to_keyword(backend)
        return _remote.open_checkpoint(path, check_variant(variant), to_keyword(extra))
    arguments = (encode_input_path(path), to_keyword(backend), check_variant(variant), to_keyword(extra))
    pending = call(_PendingFile, *arguments)
    run(pending, None, "open")
    return call(pending.result)


@dynamo_disable
@explains_keywords
def load_sharded(
    path: Path,
    device: Device = "cpu",
    *,
    backend: str = "mmap",
    prefault: bool | None = None,
    dtype: Dtype = None,
    names: Names = None,
    variant: str | None = None,
    extra: str = "error",
    progress: Progress = None,
    filesystem: Any = None,
) -> dict[str, torch.Tensor]:
    """Loads the tensors of a checkpoint of one file, or of several files with an index.

    The index is checked before a tensor is read: each file holds the tensors that the index lists for it, and no others
    unless ``extra`` allows them, and no file is outside the directory.

    Args:
        path: a directory, an index (its name ends in ``.json``), or a file; str, bytes or os.PathLike, or a URL as
            for load_file. A directory means its ``model.safetensors``, then ``model.safetensors.index.json``, as in
            transformers, then its only checkpoint of another name.
        device: the device of the tensors, as for load_file.
        backend: "mmap" or "pread", as for load_file.
        prefault: whether to bring mapped pages into memory, as for load_file.
        dtype: the dtype to convert floating-point tensors to, as for load_file.
        names: the tensors to load, as for load_file; files that have none of them are not read.
        variant: the variant to load from a directory: "fp16" means ``model.fp16.safetensors``,
            ``model.safetensors.index.fp16.json`` and the other names that diffusers and transformers use.
        extra: the treatment of tensors that the index does not list: "error" refuses the checkpoint, "ignore" skips
            them.
        progress: a bar or a function, as for load_file.
        filesystem: what ``path`` is in, as for load_file.

    Returns:
        The tensors by name, file after file, in the order of their data.

    Raises:
        SafetensorError: an index that is malformed, names a file outside its directory, or does not fit its files; a
            directory without a checkpoint, or with several; a variant of a file; and what load_file raises.
        OSError: a file is missing or cannot be read.
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
    target, to_dtype, progress = to_device(device), check_dtype(dtype), check_progress(progress)
    path = located(path, filesystem)
    file = open_checkpoint(path, backend, variant, extra)
    return load_opened(file, path, target, backend, prefault, to_dtype, names, progress)


def load_opened(
    file: Any,
    path: Path | RemotePath,
    device: torch.device,
    backend: str,
    prefault: bool | None = None,
    dtype: torch.dtype | None = None,
    names: Names = None,
    progress: Progress = None,
) -> dict[str, torch.Tensor]:
    """Loads from ``file``, the open checkpoint at ``path``, as load_sharded does."""
    if is_traced() and not isinstance(path, RemotePath):
        return _load_file_by_file(file, encode_path(path), select(file, names), device, backend, prefault, dtype)
    with NamedFile(title_of(path)):
        return load_in_steps(file, device, dtype, names, progress, prefault)


def _load_file_by_file(
    file: Any,
    path: bytes,
    names: list[str] | None,
    device: torch.device,
    backend: str,
    prefault: bool | None,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """Loads through operators, which a dispatch mode sees."""
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
@explains_keywords
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
    filesystem: Any = None,
) -> list[str]:
    """Saves tensors as a checkpoint in a directory: one file, or several and their index.

    File names, index and division are those of Hugging Face's tools: tensors go into the files in their order, and a
    tensor that would exceed the size begins a new file. A checkpoint of the same stem is replaced as a whole;
    docs/saving.md describes the steps, and what a killed process leaves behind. Nothing is written if a check fails.

    Args:
        tensors: the tensors by name, as for save_file.
        directory: the directory for the files, created if missing; str, bytes or os.PathLike, or a URL.
        metadata: text to store in the header of each file. ``format`` = ``pt``, which Hugging Face's tools require, is
            added if missing.
        max_shard_size: the most bytes of tensors in one file, as a number or with a unit ("5GB", "500MB", "2GiB"). A
            larger tensor gets a file of its own.
        stem: the beginning of the file names.
        force_contiguous: whether to copy tensors that are not contiguous, as for save_file.
        shared: the treatment of tensors that share memory, as for save_file.
        durable: whether to return only after all files are on disk, as for save_file.
        progress: a bar or a function, as for save_file.
        filesystem: what ``directory`` is in, as for load_file.

    Returns:
        The names of the files, the index last.

    Raises:
        ValueError: an invalid size; and what save_file raises.
        SafetensorError: a stem that cannot begin a file name; and what save_file raises.
        RuntimeError, TypeError, UnicodeEncodeError, OSError: as save_file.

    Example:
        >>> save_sharded({"a": torch.zeros(3)}, directory)
        ['model.safetensors']
    """
    check_bool(durable, "durable")
    progress, rules, size = check_progress(progress), check_rules(force_contiguous, shared), parse_size(max_shard_size)
    if not isinstance(stem, str):
        raise TypeError(f"stem must be a str, not {type(stem).__name__}")
    tensors, metadata = check_tensors(tensors, metadata, "save_sharded(tensors, directory)", **rules)
    entries = {"format": "pt", **(metadata or {})}
    target = located(directory, filesystem)
    is_remote = isinstance(target, RemotePath)
    path = target.title.encode() if is_remote else encode_path(target)
    with _disable_current_modes():
        with DisableTorchFunction():
            arguments = (list(tensors), list(tensors.values()), entries, path, stem, size)
            save = call(_PendingShardedSave, *arguments, *rules.values(), durable)
        if is_remote:
            from ._upload import upload_checkpoint

            return upload_checkpoint(target, save, progress)
        run(save, progress, "save")
        return call(save.result)


def parse_size(size: int | str) -> int:
    """Returns a number of bytes, from a number or text with a unit: powers of 1000 ("5GB") or 1024 ("5GiB").

    Raises:
        ValueError: the text is not a size, or the size is less than 1 byte or too large.
        TypeError: it is neither a number nor text.
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
                f"{short_repr(size)} is not a size: give bytes as a number, or with a unit, such as '5GB' or '500MiB'"
            )
        parsed = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if not 1 <= parsed < 1 << 63:
        raise ValueError(f"{short_repr(size)} is out of range for a size: give 1 byte or more, such as '5GB'")
    return parsed
