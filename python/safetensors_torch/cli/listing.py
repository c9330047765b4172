"""What a path holds, for the commands: tensors with dtype, shape and place, metadata, files. Reads headers only.

Owns how sizes and shapes are printed too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from .._headers import Tensor, read_headers


class Listing:
    """What the headers of a file or a checkpoint have."""

    def __init__(self, path: str) -> None:
        """Reads the headers of ``path``: a file, an index, or a directory with either."""
        self.path = path
        self.files, self.metadata, tensors = read_headers(path)
        self.entries = {tensor.name: tensor for tensor in tensors}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def directory(self) -> str:
        """The directory in which the files are."""
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path)


def kind_text(tensor: Tensor) -> str:
    """The dtype and the shape of a tensor in one word."""
    return f"{tensor.dtype} {shape_text(tensor.shape)}"


def shape_text(shape: list[int]) -> str:
    """A shape as ``[3, 4]``."""
    return f"[{', '.join(map(str, shape))}]"


def size_text(nbytes: int) -> str:
    """A number of bytes for a person."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def printable(text: str) -> str:
    """A name for one line of a terminal: control characters, and what the output cannot encode, as escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def wants_bar(options: Any) -> bool:
    """Whether long work shows a bar: on a terminal, where tqdm is installed, unless --quiet says no."""
    if options.quiet or not sys.stderr.isatty():
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError:
        return False
    return True


def add_quiet(command: Any) -> None:
    """The option that wants_bar asks for."""
    command.add_argument("-q", "--quiet", action="store_true", help="show no progress bar on a terminal")
