"""The tensors, metadata and files of a path, from its headers, and the output of sizes, shapes and names."""

from __future__ import annotations

import os
import sys
from typing import Any

from .._headers import Tensor, read_headers


class Listing:
    """The contents of the headers of a file or a checkpoint."""

    def __init__(self, path: str) -> None:
        """Reads the headers of ``path``: a file, an index, or a directory with either."""
        self.path = path
        self.files, self.metadata, tensors = read_headers(path)
        self.entries = {tensor.name: tensor for tensor in tensors}

    def directory(self) -> str:
        """Returns the directory of the files."""
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path)


def kind_text(tensor: Tensor) -> str:
    """Returns the dtype and the shape of a tensor as text."""
    return f"{tensor.dtype} {shape_text(tensor.shape)}"


def shape_text(shape: list[int]) -> str:
    """Returns a shape as ``[3, 4]``."""
    return f"[{', '.join(map(str, shape))}]"


def size_text(nbytes: int) -> str:
    """Returns a number of bytes with a unit."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def printable(text: str) -> str:
    """Returns ``text`` with escapes for control characters and for characters that the output cannot encode."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def wants_bar(options: Any) -> bool:
    """Returns whether to show a bar: on a terminal, if tqdm is installed, without --quiet."""
    if options.quiet or not sys.stderr.isatty():
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError:
        return False
    return True


def add_quiet(command: Any) -> None:
    """Adds the option --quiet for wants_bar."""
    command.add_argument("-q", "--quiet", action="store_true", help="show no progress bar on a terminal")
