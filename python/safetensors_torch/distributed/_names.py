"""The names that torch.distributed.checkpoint has given to files and metadata; other tools match them."""

from __future__ import annotations

POSITIONS_KEY = "DCP_SHARDING_INFO"
OFFSETS_KEY = "saved_offsets"
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
