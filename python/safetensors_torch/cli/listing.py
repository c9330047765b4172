"""The tensors, metadata and files of a path, from its headers: their selection by name, their output, and what to do
about a path that cannot be opened.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from .._exceptions import SafetensorError, os_error
from .._headers import TensorInfo, read_headers
from .._locations import RemotePath, is_url, located, title_of_url
from .terminal import printable, printable_text

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
"""The ends of the names of torch.save's files."""

_MOST_VALUE = 100


class NoMatchError(LookupError):
    """Nothing in a file matches: the exit status is 1."""


class Listing:
    """The contents of the headers of a file or a checkpoint."""

    def __init__(self, path: str) -> None:
        """Reads the headers of ``path``: a file, an index, or a directory with either; or a URL of one."""
        self.location = located(path)
        self.is_remote = isinstance(self.location, RemotePath)
        self.path = self.location.title if self.is_remote else path
        with remedies(path):
            self.files, self.metadata, tensors = read_headers(self.location)
        self.entries = {tensor.name: tensor for tensor in tensors}

    def paths(self) -> list[str]:
        """Returns the paths of the files."""
        if self.is_remote and len(self.files) == 1:
            return [self.path]
        if self.is_remote:
            directory = self.path.rpartition("/")[0] if self.path.endswith(".json") else self.path.rstrip("/")
            return [f"{directory}/{name}" for name in self.files]
        if not os.path.isdir(self.path) and not self.path.endswith(".json"):
            return [self.path]
        directory = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        return [os.path.join(directory, name) for name in self.files]

    def nbytes(self) -> int:
        """Returns the size of all files."""
        if not self.is_remote:
            return sum(os.path.getsize(file) for file in self.paths())
        # A file ends with its last tensor.
        ends: dict[str, int] = {}
        for entry in self.entries.values():
            ends[entry.file] = max(ends.get(entry.file, 0), entry.begin + entry.nbytes)
        return sum(ends.values())

    def select(self, patterns: Iterable[str]) -> list[TensorInfo]:
        """Returns the tensors whose names match one of ``patterns``: names, or globs such as ``*.bias``.

        Raises:
            NoMatchError: no name matches one of them.
        """
        selected = set()
        for pattern in patterns:
            found = self.matching(pattern)
            if not found:
                raise NoMatchError(f"{self.path}: no tensor matches {pattern!r}; {self._instead(pattern)}")
            selected.update(found)
        return [entry for name, entry in self.entries.items() if name in selected]

    def matching(self, pattern: str) -> list[str]:
        """Returns the names that are ``pattern`` or match it as a glob."""
        return [name for name in self.entries if name == pattern or fnmatch.fnmatchcase(name, pattern)]

    def _instead(self, pattern: str) -> str:
        kept = (self.metadata or {}).get(pattern)
        if kept in self.entries:
            return f"the metadata says that {kept} has its values"
        part = sum(pattern in name for name in self.entries)
        if part:
            return f"'*{pattern}*' matches {part}"
        similar = near(pattern, self.entries)
        return f"did you mean {similar}?" if similar else f"{command_text('ls', self.path)} lists the names"


def check_local(path: str) -> None:
    """Checks that ``path`` is not a URL, for a command that takes none.

    Raises:
        ValueError: it is one.
    """
    if is_url(path):
        name = path.partition("?")[0].rstrip("/").rpartition("/")[2]
        local = command_text("convert", path, name if name.endswith(".safetensors") else f"{name}.safetensors")
        raise ValueError(f"{title_of_url(path)}: this command takes local files; fetch it: {local}")


@contextlib.contextmanager
def remedies(path: str) -> Iterator[None]:
    """Adds to an error of opening ``path`` what to do about it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        remedy = _remedy(path)
        if not remedy:
            raise
        if isinstance(error, OSError):
            raise os_error(error.errno or 0, f"{error}; {remedy}") from None
        explained = SafetensorError(f"{error}; {remedy}")
        explained._code = error._code
        raise explained from None


def _remedy(path: str) -> str:
    if is_url(path):
        return ""
    directory, name = os.path.split(path.rstrip("/"))
    if not os.path.lexists(path):
        return _remedy_for_missing(path, directory, name)
    if os.path.isdir(path):
        names = os.listdir(path)
        if any(name.endswith(".safetensors") for name in names):
            return ""
        old = any(name.lower().endswith(TORCH_SUFFIXES) for name in names)
        return _convert(path, path.rstrip("/")) if old else ""
    if name.lower().endswith(TORCH_SUFFIXES):
        return f"or {_convert(path, os.path.splitext(path)[0])}"
    if name.endswith(".json") and not name.endswith(".index.json"):
        return f"open its directory: {directory or '.'}"
    return ""


def _remedy_for_missing(path: str, directory: str, name: str) -> str:
    if not os.path.isdir(directory or "."):
        if "/" not in directory and not name.endswith((".safetensors", ".json", *TORCH_SUFFIXES)):
            return f"if it is a repository of Hugging Face: {command_text('ls', f'hf://{path}')}"
        return f"{directory} does not exist either"
    names = os.listdir(directory or ".")
    if similar := near(name, names):
        return f"did you mean {os.path.join(directory, similar)}?"
    found = sorted(name for name in names if name.endswith(".safetensors"))
    first = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    return f"{directory or 'the current directory'} has {first or 'no safetensors file'}"


def _convert(path: str, stem: str) -> str:
    return f"convert it: {command_text('convert', path, f'{stem}.safetensors')}"


def command_text(*words: str) -> str:
    """Returns the command line of the shell command with these arguments, as bash reads it."""
    return f"safetensors-torch {' '.join(map(_shell_word, words))}"


def _shell_word(word: str) -> str:
    import shlex  # not above: only errors need it

    if printable_text(word) == word:
        return shlex.quote(word)
    escaped = printable(word).replace("'", "\\'")
    return f"$'{escaped}'"


def near(word: str, words: Iterable[str]) -> str | None:
    """Returns the one of ``words`` that is most like ``word``, or None if none is like it."""
    import difflib  # not above: only errors need it

    return next(iter(difflib.get_close_matches(word, words, 1)), None)


def natural_key(name: str) -> list[Any]:
    """Returns a key that sorts ``layer.2`` before ``layer.10``."""
    parts: list[Any] = re.split("([0-9]+)", name)
    # int() refuses thousands of digits, and longer numbers are larger.
    parts[1::2] = [(len(digits.lstrip("0")), digits.lstrip("0"), digits) for digits in parts[1::2]]
    return parts


def check_file_target(path: str, force: bool) -> None:
    """Checks that ``path`` is the name of a safetensors file, which exists only if ``force`` is set.

    Raises:
        ValueError: it is not.
    """
    if os.path.isdir(path) or path.endswith("/"):
        raise ValueError(f"{path}: a directory; write {os.path.join(path, 'model.safetensors')} for a file in it")
    if not path.endswith(".safetensors"):
        raise ValueError(f"{path}: not a name of a safetensors file; write {file_name(path)}")
    directory = os.path.dirname(path)
    if directory and not os.path.isdir(directory):
        raise ValueError(f"{directory}: no such directory; create it: mkdir -p {directory}")
    check_absent(path, force)


def check_absent(path: str, force: bool) -> None:
    """Checks that a target does not exist, unless ``force`` is set.

    Raises:
        ValueError: it exists.
    """
    if not force and os.path.lexists(path):
        raise ValueError(f"{path} exists already: give another target, or --force to replace it")


def check_directory_target(path: str, force: bool) -> None:
    """Checks that a target is not a file, nor a directory with safetensors files, unless ``force`` is set.

    Raises:
        ValueError: it is.
    """
    if not os.path.isdir(path) or any(name.endswith(".safetensors") for name in os.listdir(path)):
        check_absent(path, force)


def file_name(path: str) -> str:
    """Returns ``path`` with the end of a safetensors file in place of another one."""
    return re.sub(r"\.[A-Za-z]+[0-9]?$", "", path) + ".safetensors"


def parameters(tensor: TensorInfo) -> int:
    """Returns the number of elements."""
    count = 1
    for dimension in tensor.shape:
        count *= dimension
    return count


def as_json(tensor: TensorInfo) -> dict[str, Any]:
    """Returns a tensor's entry as a dict for JSON."""
    return {**tensor._asdict(), "end": tensor.begin + tensor.nbytes}


def counted(count: int, noun: str) -> str:
    """Returns a count and a noun: ``1 tensor``, ``1,024 tensors``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def kind_text(tensor: TensorInfo) -> str:
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


def value_text(value: str) -> str:
    """Returns a value of metadata, or the beginning and the length of a long one."""
    return printable_text(
        value if len(value) <= _MOST_VALUE else f"{value[:_MOST_VALUE]}... ({len(value):,} characters)"
    )


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
