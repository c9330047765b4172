"""inspect: what the headers of a checkpoint say.

Owns the result; _headers reads through the C library.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ._arguments import Path, encode_input_path
from ._headers import TensorInfo, read_headers
from ._keywords import explains_keywords
from ._locations import RemotePath, located


class CheckpointInfo(NamedTuple):
    """What the headers of a file, or of a checkpoint of several files, say."""

    files: list[str]
    """The names of the files, relative to the directory of the checkpoint."""
    metadata: dict[str, str] | None
    """The metadata; None if no file has any. The first file that has a key counts."""
    tensors: dict[str, TensorInfo]
    """The dtype, shape, size and place of each tensor, file after file, in the order of their data."""


@explains_keywords
def inspect(path: Path, *, filesystem: Any = None) -> CheckpointInfo:
    """Returns the names, dtypes and shapes of the tensors of a checkpoint, and its metadata. Reads only the headers.

    Dtypes are the codes of the format, such as "F32". Neither torch nor the operators are used, so
    ``python -m safetensors_torch ls --json``, which shows the same, does not even import them.

    Args:
        path: a file, an index or a directory, as for load_sharded; str, bytes or os.PathLike, or a URL.
        filesystem: what ``path`` is in, as for load_file.

    Raises:
        SafetensorError: a file is not valid safetensors, or does not fit the index.
        OSError: a file cannot be read.
        TypeError, ValueError: ``path`` is not a path.

    Example:
        >>> save_file({"weight": torch.ones(2, 3)}, path, {"format": "pt"})
        >>> info = inspect(path)
        >>> info.metadata, info.tensors["weight"].dtype, info.tensors["weight"].shape
        ({'format': 'pt'}, 'F32', [2, 3])
    """
    path = located(path, filesystem)
    headers = read_headers(path if isinstance(path, RemotePath) else encode_input_path(path))
    return CheckpointInfo(headers.files, headers.metadata, {tensor.name: tensor for tensor in headers.tensors})
