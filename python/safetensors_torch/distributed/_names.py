"""The names that torch.distributed.checkpoint has given to files and metadata; other tools match them."""

from __future__ import annotations

import re

POSITIONS_KEY = "DCP_SHARDING_INFO"
OFFSETS_KEY = "saved_offsets"
# Ours: the shape of the whole tensor, without which a missing file can go unnoticed.
SHAPE_KEY = "shape"
VERSION_KEY = "DCP_VERSION"
VERSION = "1.0"

# The subdirectory for the files of each process, if the directory itself gets the final ones.
SHARDED_DIRECTORY = "sharded"

CHUNK_FILE_PREFIX = "shard-"
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


def chunk_file_name(rank: int, number: int, count: int) -> str:
    """Returns the name of a file with chunks of one process, whose ranks are counted from 1."""
    return f"{CHUNK_FILE_PREFIX}{rank:05d}-model-{number:05d}-of-{count:05d}{SUFFIX}"


def is_chunk_file_name(name: str) -> bool:
    """Returns whether chunk_file_name has made a name."""
    return re.fullmatch(r"shard-[0-9]{5,}-model-[0-9]{5,}-of-[0-9]{5,}\.safetensors", name) is not None
