"""Writes one HTML page that shows a file or a checkpoint: the sizes of its modules as a treemap, its tensors as a table
to search and to sort, its metadata, and the layout of its files. The page needs a browser, but no network.

With --stats, all data is read, and the page has the minimum, maximum, mean, standard deviation and a histogram of each
tensor, and marks those with NaN or infinite values.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._exceptions import os_error
from .._headers import TensorInfo
from .._locations import is_url
from .._progress import ProgressBar
from .listing import Listing, add_quiet, check_absent, natural_key, parameters, shape_text, size_text, wants_bar
from .terminal import printable

if TYPE_CHECKING:
    from .._statistics import Statistics

HELP = "draw a checkpoint as an HTML page"
EXAMPLES = """examples:
  safetensors-torch view model.safetensors
  safetensors-torch view checkpoint/ -o checkpoint.html --stats
  safetensors-torch view s3://bucket/model.safetensors -o remote.html --json
"""

PARTS = Path(__file__).resolve().parent / "page"
"""The directory with the parts of the page."""

# In this order: later ones use what earlier ones define.
SCRIPTS = (
    "text.js",
    "data.js",
    "colors.js",
    "tree.js",
    "state.js",
    "treemap.js",
    "map.js",
    "groups.js",
    "details.js",
    "columns.js",
    "table.js",
    "metadata.js",
    "files.js",
    "main.js",
)

# How many bins the histograms have, so that a page of many tensors stays small.
_MOST_BINS, _FEW_BINS, _MANY = 64, 32, 4000

# The states of a tensor in a comparison, as data.js numbers them.
EQUAL, VALUES, KIND, LEFT_ONLY, RIGHT_ONLY, NOT_COMPARED = range(6)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", help="a file, an index (.json), or a directory with either; or a URL")
    command.add_argument("-o", "--output", metavar="PAGE", help="the page (default: the name of the file, with .html)")
    command.add_argument("--stats", action="store_true", help="read all data, and show statistics of the values")
    command.add_argument("--force", action="store_true", help="replace an existing page")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    target = options.output or default_name(options.path)
    check_target(target, options.force)
    listing = Listing(options.path)
    check_source(target, listing)
    names = sorted(listing.entries, key=natural_key)
    content = describe(file_title(listing.path), [listing], names)
    if options.stats:
        content["statistics"] = _statistics(listing, names, options)
    write(target, content)
    report(target, {"count": len(names)}, options.json)
    return 0


def report(target: str, result: dict[str, Any], as_json: bool) -> None:
    """Prints where the page is."""
    nbytes = os.path.getsize(target)
    if as_json:
        print(json.dumps({"path": target, "nbytes": nbytes, **result}, indent=2))
    else:
        print(f"{printable(target)}: {size_text(nbytes)}; open it in a browser")


def file_title(path: str) -> str:
    """Returns the last part of a path or a URL."""
    trimmed = path.rstrip("/")
    return trimmed.rpartition("/")[2] if is_url(path) else os.path.basename(os.path.abspath(trimmed or path)) or path


def default_name(path: str) -> str:
    """Returns the name of the page for a checkpoint: that of its file or directory."""
    title = file_title(path.partition("?")[0] if is_url(path) else path)
    return re.sub(r"(\.safetensors)?(\.index)?(\.json)?$", "", title, count=1) + ".html"


def check_target(path: str, force: bool) -> None:
    """Checks that a page can be written to ``path``, which exists only if ``force`` is set.

    Raises:
        ValueError: it cannot.
    """
    if os.path.isdir(path) or path.endswith("/"):
        raise ValueError(f"{path}: a directory; write {os.path.join(path, 'model.html')} for a page in it")
    directory = os.path.dirname(path)
    if directory and not os.path.isdir(directory):
        raise ValueError(f"{directory}: no such directory; create it: mkdir -p {directory}")
    stem, end = os.path.splitext(path)
    if end in (".safetensors", ".json"):
        raise ValueError(f"{path}: the name of a checkpoint's file, not of a page; write {stem}.html")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file; write the name of a new one")
    check_absent(path, force)


def check_source(target: str, *listings: Listing) -> None:
    """Checks that a page does not replace a file that it shows, whatever the file is called.

    Raises:
        ValueError: it does.
    """
    files = [file for one in listings if not one.is_remote for file in (one.path, *one.paths())]
    if os.path.exists(target) and any(os.path.samefile(target, file) for file in files):
        raise ValueError(f"{target}: a file of the checkpoint, not a page; write the name of a new one")


def write_comparison(target: str, left: Listing, right: Listing, changes: dict[str, list[Any]]) -> None:
    """Writes the page of two checkpoints.

    Args:
        changes: the state of each tensor. After VALUES: how many elements differ, in how many a side is NaN, the
            largest difference of the others, and the norm of the difference relative to that of the right side.
    """
    names = sorted(changes, key=natural_key)
    titles = [file_title(listing.path) for listing in (left, right)]
    content = describe(" ↔ ".join(titles), [left, right], names)
    content["changes"] = [[_number(value) for value in changes[name]] for name in names]
    write(target, content)


class _Table:
    """Numbers for texts, which a page has once."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, row: Any) -> int:
        return self._numbers.setdefault(row, len(self._numbers))

    def rows(self) -> list[Any]:
        return list(self._numbers)


def describe(title: str, listings: Sequence[Listing], names: Iterable[str]) -> dict[str, Any]:
    """Returns the data of a page about the tensors ``names`` of one checkpoint, or of two.

    It has a list for each column, with an item for each name: objects would repeat their keys for each tensor.
    """
    names, dtypes, shapes = list(names), _Table(), _Table()
    sides = [_side(listing, names, dtypes, shapes) for listing in listings]
    return {
        "title": title,
        "names": names,
        "sides": sides,
        "dtypes": dtypes.rows(),
        "shapes": shapes.rows(),
        "statistics": None,
        "changes": None,
    }


def _side(listing: Listing, names: list[str], dtypes: _Table, shapes: _Table) -> dict[str, Any]:
    files = {name: number for number, name in enumerate(listing.files)}

    def row(entry: TensorInfo | None) -> tuple[int, int, int, int, int]:
        if entry is None:
            return -1, -1, -1, -1, -1
        shape = shapes.number((shape_text(entry.shape), parameters(entry)))
        return dtypes.number(entry.dtype), shape, entry.nbytes, files[entry.file], entry.begin

    rows = [row(listing.entries.get(name)) for name in names]
    columns = {
        key: [values[at] for values in rows] for at, key in enumerate(("dtype", "shape", "nbytes", "file", "begin"))
    }
    return {
        "path": listing.path,
        "files": list(zip(listing.files, _file_sizes(listing), strict=True)),
        "metadata": None if listing.metadata is None else sorted(listing.metadata.items()),
        **columns,
    }


def _file_sizes(listing: Listing) -> list[int]:
    if not listing.is_remote:
        return [os.path.getsize(file) for file in listing.paths()]
    # A file ends with its last tensor.
    ends = dict.fromkeys(listing.files, 0)
    for entry in listing.entries.values():
        ends[entry.file] = max(ends[entry.file], entry.begin + entry.nbytes)
    return list(ends.values())


def _statistics(listing: Listing, names: list[str], options: argparse.Namespace) -> list[Any]:
    from .._statistics import iterate_statistics  # not above: other commands do without

    rows: dict[str, Any] = {}
    with ProgressBar("view", wants_bar(options)) as report_progress:
        found = iterate_statistics(listing.location, names, histogram=True, report_progress=report_progress)
        for name, statistics in found:
            rows[name] = None if statistics is None else _statistics_row(statistics, len(names))
    return [rows[name] for name in names]


def _statistics_row(found: Statistics, count: int) -> list[Any]:
    """Returns the statistics of one of ``count`` tensors: the more there are, the fewer bins a histogram has."""
    values = [_number(value) for value in (found.minimum, found.maximum, found.mean, found.std)]
    histogram: list[Any] | None = None
    if found.histogram is not None:
        begin, width, counts = found.histogram
        merged = max(1, -(-len(counts) // (_MOST_BINS if count <= _MANY else _FEW_BINS)))
        bins = [sum(counts[at : at + merged]) for at in range(0, len(counts), merged)]
        histogram = [_number(begin), _number(width * merged), bins]
    return [found.zeros, found.nans, found.infs, *values, histogram]


def _number(value: float | str | None) -> float | str | None:
    """Returns a number as JSON can have it: seven digits, and infinite ones as text."""
    if value is None or not isinstance(value, float):
        return value
    return (
        float(f"{value:.7g}") if math.isfinite(value) else str(value).replace("inf", "Infinity").replace("nan", "NaN")
    )


def write(target: str, content: dict[str, Any]) -> None:
    """Writes the page, which replaces ``target`` once it is complete."""
    page = build(content)
    try:
        _write(os.path.realpath(target), page)
    except OSError as error:
        # It names a temporary file, or none.
        reason = f"cannot write the page: {error.strerror}; give another target"
        raise os_error(error.errno or 0, f"{target}: {reason}") from None


def _write(target: str, page: str) -> None:
    mask = os.umask(0)
    os.umask(mask)
    handle, staged = tempfile.mkstemp(prefix=".view-", suffix=".html", dir=os.path.dirname(target))
    try:
        with open(handle, "w", encoding="utf-8", newline="") as out:
            os.fchmod(handle, 0o666 & ~mask)
            out.write(page)
        os.replace(staged, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staged)
        raise


def build(content: dict[str, Any]) -> str:
    """Returns the page with its data. The names in it cannot end the script that they are in."""
    data = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    style = (PARTS / "page.css").read_text(encoding="utf-8")
    scripts = "".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{scripts}}})();\n'
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; base-uri 'none';"
        " form-action 'none'; require-trusted-types-for 'script'"
    )
    parts = {"policy": policy, "style": style, "script": script, "data": data}
    frame = (PARTS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def _source(text: str) -> str:
    """Returns the source expression of a content security policy that allows exactly ``text``."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
