"""The classes of torch.distributed.checkpoint that ours derive from."""

from __future__ import annotations

import importlib
from typing import Any


def torch_class(name: str, base: type) -> Any:
    """Returns torch's class of this name, if it has one that derives from ``base`` (torch 2.9), else ``base``."""
    try:
        found = getattr(importlib.import_module("torch.distributed.checkpoint"), name, None) or getattr(
            importlib.import_module("torch.distributed.checkpoint.hf_storage"), name
        )
    except (ImportError, AttributeError):
        return base
    return found if isinstance(found, type) and issubclass(found, base) else base
