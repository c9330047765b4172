"""Checkpoints of many processes, over ``torch.distributed``.

``import safetensors_torch`` does not import this package, nor ``torch.distributed``: import it where it is used.
"""

from __future__ import annotations

from ._consolidate import consolidate
from ._load import load_dtensors, load_into
from ._local_ranges import local_ranges
from ._planners import LoadPlanner, SavePlanner
from ._save import save
from ._storage_reader import HuggingFaceStorageReader, QuantizedHuggingFaceStorageReader
from ._storage_writer import HuggingFaceStorageWriter
from ._weights_iterator import weights_iterator

__all__ = [
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "LoadPlanner",
    "QuantizedHuggingFaceStorageReader",
    "SavePlanner",
    "consolidate",
    "load_dtensors",
    "load_into",
    "local_ranges",
    "save",
    "weights_iterator",
]
