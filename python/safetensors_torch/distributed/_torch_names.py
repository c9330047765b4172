"""The classes of torch.distributed.checkpoint that ours derive from."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class _StorageInfo:
    relative_path: str
    shape: torch.Size
    dtype: torch.dtype


def storage_info(relative_path: str, shape: torch.Size, dtype: torch.dtype) -> Any:
    """Returns torch's description of where a chunk is; one of the same attributes if this torch has another."""
    try:
        return importlib.import_module("torch.distributed.checkpoint._hf_utils")._HFStorageInfo(
            relative_path=relative_path, shape=shape, dtype=dtype
        )
    except (ImportError, AttributeError, TypeError):
        return _StorageInfo(relative_path, shape, dtype)


def torch_class(name: str, base: type) -> Any:
    """Returns torch's class of this name, if it has one that derives from ``base`` (torch 2.9), else ``base``."""
    try:
        found = getattr(importlib.import_module("torch.distributed.checkpoint"), name, None) or getattr(
            importlib.import_module("torch.distributed.checkpoint.hf_storage"), name
        )
    except (ImportError, AttributeError):
        return base
    return found if isinstance(found, type) and issubclass(found, base) else base
