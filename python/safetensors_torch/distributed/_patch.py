"""What patch_safetensors(dcp=True) puts in the place of torch's own: the classes and functions of
torch.distributed.checkpoint for safetensors files.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch.distributed as dist

from ._consolidate import consolidate
from ._storage_reader import HuggingFaceStorageReader, QuantizedHuggingFaceStorageReader
from ._storage_writer import HuggingFaceStorageWriter

_CHECKPOINT = "torch.distributed.checkpoint"
_CLASSES = {
    HuggingFaceStorageWriter: "hf_storage",
    HuggingFaceStorageReader: "hf_storage",
    QuantizedHuggingFaceStorageReader: "quantized_hf_storage",
}
_CONSOLIDATE = "_consolidate_hf_safetensors"


def _rebuild(ours: type, state: dict[str, Any]) -> Any:
    instance = ours.__new__(ours)
    instance.__dict__.update(state)
    return instance


def _replacement(ours: type, module: str) -> type:
    """Returns a class derived from ours: a module that imported ours from here must keep it after the patch.

    A process that unpickles an object may not be patched: it gets one of ours.
    """

    def reduce(self: Any) -> Any:
        return _rebuild, (ours, self.__getstate__())

    members = {"__module__": module, "__doc__": ours.__doc__, "__reduce__": reduce}
    return type(ours.__name__, (ours,), members)


def consolidate_safetensors_files(
    input_dir: str, output_dir: str, fqn_to_index_mapping: dict[str, int], num_threads: int = 1
) -> None:
    """Calls safetensors_torch.distributed.consolidate."""
    consolidate(input_dir, output_dir, fqn_to_index_mapping=fqn_to_index_mapping)


def consolidate_safetensors_files_on_every_rank(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
    process_group: Any = None,
) -> None:
    """Calls safetensors_torch.distributed.consolidate in the first process of the group; the others wait."""
    if process_group is None and dist.is_available() and dist.is_initialized():
        process_group = dist.group.WORLD
    consolidate(input_dir, output_dir, fqn_to_index_mapping=fqn_to_index_mapping, process_group=process_group)


def _pairs() -> list[tuple[Any, Any]]:
    pairs = []
    for function in (consolidate_safetensors_files, consolidate_safetensors_files_on_every_rank):
        pairs.append((_original(_CONSOLIDATE, function.__name__), function))
    for ours, module in _CLASSES.items():
        original = _original(module, ours.__name__)
        pairs.append((original, _replacement(ours, original.__module__)))
    return pairs


def _original(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"{_CHECKPOINT}.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"patch_safetensors(dcp=True) replaces {name} of {_CHECKPOINT}, which this torch does not have: it needs"
            " torch 2.9 or later; use the classes of safetensors_torch.distributed by name"
        ) from error


# From the first patch on, so that every patch has the same replacements.
_replaced: list[tuple[Any, Any]] = []


def replacements_by_id() -> dict[int, Any]:
    """Returns the replacements by the ids of what they replace."""
    if not _replaced:
        _replaced.extend(_pairs())
    return {id(original): replacement for original, replacement in _replaced}


def originals_by_id() -> dict[int, Any]:
    """Returns the originals by the ids of their replacements."""
    return {id(replacement): original for original, replacement in _replaced}
