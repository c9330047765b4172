"""save_file and save: a file, or its bytes in memory, from a dict of tensors.

Owns the order of the checks and the steps of a save. The native library lays the file out and writes it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import _buffer
from ._arguments import Metadata, Path, check_bool, encode_path, to_keyword
from ._errors import call
from ._keywords import explains_keywords
from ._locations import RemotePath, located
from ._progress import Progress, check_progress, run
from ._save_checks import DisableTorchFunction, Tensors, check_tensors
from ._tracing import dynamo_disable

_PendingSave = torch.classes.safetensors_torch.PendingSave


@dynamo_disable
@explains_keywords
def save_file(
    tensors: dict[str, torch.Tensor],
    filename: Path,
    metadata: dict[str, str] | None = None,
    *,
    force_contiguous: bool = False,
    shared: str = "error",
    durable: bool = False,
    progress: Progress = None,
    filesystem: Any = None,
) -> None:
    """Saves tensors into a safetensors file, which appears complete or not at all.

    Args:
        tensors: the tensors by name: dense, contiguous, on any device, no two sharing memory. Subclasses of Tensor are
            saved as tensors, without a call of their ``__torch_function__``.
        filename: the file, replaced if it exists; str, bytes or os.PathLike. A symbolic link is replaced; the file that
            it points to stays as it is. Or a URL as for load_file, to which the bytes are sent as they are read.
        metadata: text to store in the header. None stores none, an empty dict an empty object.
        force_contiguous: True copies tensors that are not contiguous, one at a time; False refuses them.
        shared: the treatment of tensors that share memory. "error" refuses them. "keep_one" writes one name of each
            group, the first alphabetically whose tensor covers the whole memory, and records the other names in the
            file's metadata, as save_model does. The caller's dicts do not change.
        durable: whether to return only after the file is on disk and survives a power cut (fsync of the file and its
            directory). Otherwise the kernel writes it within about half a minute.
        progress: True shows a bar of tqdm. A function is called with the bytes done and the total, about ten times a
            second and at the end. An exception from it ends the save without writing the file, unless it was complete.
        filesystem: what ``filename`` is in, as for load_file.

    Raises:
        ValueError: not a dict of tensors; a tensor that is sparse, nested, not contiguous, or without a shape (lazy
            modules); an unknown ``shared``.
        RuntimeError: tensors share memory, and with "keep_one" none of them covers it; a meta or fake tensor; a storage
            that is too small for its tensor, or is resized during the save.
        TypeError: a key, or a metadata key or value, is not a str.
        UnicodeEncodeError: one of those has a lone surrogate.
        SafetensorError: a dtype that the format lacks, a tensor without memory of its own (a wrapper subclass such as
            DTensor), or one called ``__metadata__``.
        OSError: the file cannot be written.

    Nothing is written if a check fails.

    Example:
        >>> save_file({"weight": torch.ones(2, 3)}, path, metadata={"format": "pt"}, durable=True)
        >>> weight = torch.ones(2, 3)
        >>> save_file({"weight": weight, "row": weight[0]}, path)
        Traceback (most recent call last):
        RuntimeError: Some tensors share memory, ...
    """
    check_bool(durable, "durable")
    progress, rules = check_progress(progress), check_rules(force_contiguous, shared)
    tensors, metadata = check_tensors(tensors, metadata, "save_file(tensors, filename)", **rules)
    target = located(filename, filesystem)
    with _disable_current_modes():
        if isinstance(target, RemotePath):
            from ._upload import upload_file

            upload_file(target, _plan(tensors, metadata, target.title.encode(), **rules), progress)
            return
        path = encode_path(target)
        plan = _plan(tensors, metadata, path, **rules)
        call(plan.set_file, path, durable)
        run(plan, progress, "save")


@dynamo_disable
@explains_keywords
def save(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    *,
    force_contiguous: bool = False,
    shared: str = "error",
    progress: Progress = None,
) -> bytes:
    """Saves tensors as the bytes of a safetensors file.

    Args:
        tensors: as for save_file.
        metadata: as for save_file.
        force_contiguous: as for save_file.
        shared: as for save_file.
        progress: as for save_file.

    Returns:
        The bytes that save_file would write.

    Raises:
        What save_file raises, except OSError.

    Example:
        >>> load(save({"x": torch.arange(3)}))
        {'x': tensor([0, 1, 2])}
    """
    progress, rules = check_progress(progress), check_rules(force_contiguous, shared)
    if isinstance(metadata, (str, bytes, os.PathLike)):
        raise TypeError(
            f"metadata must be a dict of str to str or None, not {type(metadata).__name__}: save() returns bytes;"
            " save_file(tensors, filename) writes a file"
        )
    tensors, metadata = check_tensors(tensors, metadata, "save(tensors)", **rules)
    with _disable_current_modes():
        plan = _plan(tensors, metadata, b"", **rules)

        def fill(out: torch.Tensor) -> None:
            call(plan.set_memory, out)
            run(plan, progress, "save")

        return _buffer.new_bytes(call(plan.total), fill)


def check_rules(force_contiguous: Any, shared: Any) -> dict[str, Any]:
    """Returns the rules for tensors that are not contiguous or share memory, for the native library."""
    return {"force_contiguous": check_bool(force_contiguous, "force_contiguous"), "shared": to_keyword(shared)}


def _plan(tensors: Tensors, metadata: Metadata, path: bytes, *, force_contiguous: bool, shared: str) -> Any:
    """Returns the save of ``tensors``, checked and laid out. ``path`` is for the error texts."""
    with DisableTorchFunction():
        return call(_PendingSave, list(tensors), list(tensors.values()), metadata, path, force_contiguous, shared)
