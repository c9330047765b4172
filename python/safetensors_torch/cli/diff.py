"""Compares two files or checkpoints: names, dtypes, shapes, metadata and values, but not the division into files. The
status is 1 if they differ.

With --view, the differences become a page instead, as that of the command view.

Values are equal if their bits are or, with a tolerance, if |a - b| <= atol + rtol * |b|; NaN then equals NaN.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

from .._headers import TensorInfo
from .._progress import ProgressBar
from . import view
from .listing import Listing, add_quiet, kind_text, wants_bar
from .terminal import printable, printable_text

HELP = "compare names, shapes and values"
EXAMPLES = """examples:
  safetensors-torch diff model.safetensors checkpoint/
  safetensors-torch diff model.safetensors other.safetensors --no-values
  safetensors-torch diff model.safetensors other.safetensors --rtol 1e-3 --atol 1e-6 --json
  safetensors-torch diff model.safetensors checkpoint/ --view -o changes.html
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("left", help="a file, an index (.json), or a directory with either")
    command.add_argument("right", help="the file, index or directory to compare it with")
    command.add_argument("--no-values", action="store_true", help="compare only names, dtypes, shapes and metadata")
    command.add_argument("--rtol", type=float, default=0.0, help="relative tolerance of values (default: %(default)s)")
    command.add_argument("--atol", type=float, default=0.0, help="absolute tolerance of values (default: %(default)s)")
    command.add_argument("--view", action="store_true", help="draw the differences as an HTML page")
    command.add_argument("-o", "--output", metavar="PAGE", help="the page of --view (default: diff.html)")
    command.add_argument("--force", action="store_true", help="replace an existing page")
    add_quiet(command)


_PAGE = "diff.html"  # of --view


class Differences(NamedTuple):
    """The differences between the two sides."""

    left_only: list[str]
    right_only: list[str]
    kinds: list[dict[str, str]]
    """Tensors whose dtypes or shapes differ."""
    values: list[dict[str, Any]]
    metadata: list[dict[str, str | None]]


def run(options: argparse.Namespace) -> int:
    if options.rtol < 0 or options.atol < 0:
        raise ValueError("--rtol and --atol must not be negative")
    if options.view:
        view.check_target(options.output or _PAGE, options.force)
    elif options.output or options.force:
        raise ValueError("--output and --force: only a page needs them; add --view")
    left, right = Listing(options.left), Listing(options.right)
    if options.view:
        view.check_source(options.output or _PAGE, left, right)
    left_only = [name for name in left.entries if name not in right.entries]
    right_only = [name for name in right.entries if name not in left.entries]
    found = Differences(left_only, right_only, [], [], [])
    both = [(entry, right.entries[name]) for name, entry in left.entries.items() if name in right.entries]
    same = []
    for ours, theirs in both:
        if (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape):
            same.append(ours)
        else:
            found.kinds.append({"name": ours.name, "left": kind_text(ours), "right": kind_text(theirs)})
    _compare_metadata(left.metadata or {}, right.metadata or {}, found)
    if not options.no_values:
        _compare_values(left, right, same, options, found)
    if options.view:
        _draw(left, right, found, len(both), options)
    elif options.json:
        print(json.dumps({"equal": not any(found), "compared": len(both), **found._asdict()}, indent=2))
    else:
        _print(found, len(both))
    return 1 if any(found) else 0


def _compare_metadata(left: dict[str, str], right: dict[str, str], found: Differences) -> None:
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            found.metadata.append({"key": key, "left": left.get(key), "right": right.get(key)})


def _compare_values(
    left: Listing, right: Listing, entries: list[TensorInfo], options: argparse.Namespace, found: Differences
) -> None:
    if not entries:
        return
    from .._native_library import ensure_loaded  # not above: it imports torch

    ensure_loaded()
    from .._sharded import open_checkpoint
    from . import values

    sides = [open_checkpoint(one.location, "mmap") for one in (left, right)]
    total, done = sum(entry.nbytes for entry in entries), 0
    with ProgressBar("diff", wants_bar(options)) as report_progress:
        for entry in entries:
            ours, theirs = (values.flat(side, entry.name) for side in sides)
            difference = values.compare(ours, theirs, options.rtol, options.atol)
            if difference is not None:
                if options.view:
                    difference["relative_difference"] = values.relative_difference(ours, theirs)
                found.values.append({"name": entry.name, **difference})
            done += entry.nbytes
            report_progress(done, total)


def _draw(left: Listing, right: Listing, found: Differences, compared: int, options: argparse.Namespace) -> None:
    """Writes the page of --view, and prints where it is."""
    target = options.output or _PAGE
    changes = {
        **dict.fromkeys(left.entries, [view.NOT_COMPARED if options.no_values else view.EQUAL]),
        **dict.fromkeys(found.left_only, [view.LEFT_ONLY]),
        **dict.fromkeys(found.right_only, [view.RIGHT_ONLY]),
        **{kind["name"]: [view.KIND] for kind in found.kinds},
    }
    for one in found.values:
        numbers = [one["differing"], one["nan"], one["max_difference"], one["relative_difference"]]
        changes[one["name"]] = [view.VALUES, *numbers]
    view.write_comparison(target, left, right, changes)
    view.report(target, {"equal": not any(found), "compared": compared, **found._asdict()}, options.json)


def _print(found: Differences, compared: int) -> None:
    for name in found.left_only:
        print(f"only left   {printable(name)}")
    for name in found.right_only:
        print(f"only right  {printable(name)}")
    for kind in found.kinds:
        print(f"dtype, shape  {printable(kind['name'])}: {kind['left']} and {kind['right']}")
    for value in found.values:
        most, nan = value["max_difference"], value["nan"]
        by = "" if most is None else f", by up to {most:.6g}"
        by += f", NaN in {nan}" if nan else ""
        print(f"values  {printable(value['name'])}: {value['differing']} of {value['elements']} differ{by}")
    for entry in found.metadata:
        print(f"metadata {printable(entry['key'])}: {_quoted(entry['left'])} and {_quoted(entry['right'])}")
    if not any(found):
        print(f"equal: {compared} tensor(s)")


def _quoted(text: str | None) -> str:
    return "none" if text is None else printable_text(repr(text))
