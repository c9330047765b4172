"""Lists the tensors of files or checkpoints: dtype, shape, size and name, file by file. Before them the sizes of the
files and the metadata, after them the totals. No data is read.

--tree lists modules instead, with the totals of their tensors. Numbered modules of the same structure share one line,
such as layers.[0-31].
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

from .._headers import TensorInfo
from .._locations import is_url
from . import tree
from .listing import (
    Listing,
    NoMatchError,
    as_json,
    counted,
    kind_text,
    natural_key,
    parameters,
    shape_text,
    size_text,
    value_text,
)
from .terminal import Column, is_terminal, print_table, printable, styled

HELP = "list tensors, metadata and sizes"
EXAMPLES = """examples:
  safetensors-torch ls model.safetensors
  safetensors-torch ls checkpoint/ --tree --depth 2
  safetensors-torch ls checkpoint/ --sort size --match "*.weight"
  safetensors-torch ls checkpoint/model.safetensors.index.json --json
  safetensors-torch ls s3://bucket/model.safetensors
"""

# Tensors of one file stay together, except in the order of sizes.
_ORDERS = {
    "name": lambda entry: (entry.file, natural_key(entry.name)),
    "offset": lambda entry: (entry.file, entry.begin),
    "size": lambda entry: (-entry.nbytes, natural_key(entry.name)),
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", nargs="+", help="a file, an index (.json), or a directory with either; or a URL")
    command.add_argument("--tree", action="store_true", help="list modules, with the totals of their tensors")
    command.add_argument("--depth", metavar="N", type=_depth, help="list at most N levels of the tree")
    command.add_argument(
        "--sort", choices=_ORDERS, default="name", help="the order of the tensors (default: %(default)s)"
    )
    command.add_argument(
        "--match", metavar="GLOB", action="append", help="list only tensors whose names match, such as '*.bias'"
    )


def _depth(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < len(text) < 10 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: not a number of levels; write 1 or more")
    return int(text)


def run(options: argparse.Namespace) -> int:
    results, misses = [], []
    _check_paths(options.path)
    for path in options.path:
        listing = Listing(path)
        try:
            entries = listing.select(options.match) if options.match else list(listing.entries.values())
        except NoMatchError as miss:
            misses.append(miss)
            continue
        entries.sort(key=_ORDERS[options.sort])
        if options.json:
            results.append(_result(listing, entries, options))
        else:
            _print(listing, entries, options)
    if options.json:
        print(json.dumps(results, indent=2))
    if len(misses) == len(options.path):
        raise misses[0]
    return 0


def _check_paths(paths: list[str]) -> None:
    """Checks that no name of a tensor follows the path of its file.

    Raises:
        ValueError: one does.
    """
    first, *others = paths
    missing = [path for path in others if not (os.path.lexists(path) or is_url(path))]
    if missing and Listing(first).matching(missing[0]):
        raise ValueError(f"{missing[0]}: not a path; to list only some tensors: --match '{missing[0]}'")


def _result(listing: Listing, entries: list[TensorInfo], options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"path": listing.path, "files": listing.files, "metadata": listing.metadata}
    if _wants_tree(options):
        result["tree"] = _tree(entries, options).as_json(options.depth)
    else:
        result["tensors"] = [as_json(entry) for entry in entries]
    totals = _totals(entries)
    return {**result, **totals.pop(""), "dtypes": totals}


def _wants_tree(options: argparse.Namespace) -> bool:
    return options.tree or options.depth is not None


def _tree(entries: list[TensorInfo], options: argparse.Namespace) -> tree.Node:
    # Files do not matter to a module.
    root = tree.build(sorted(entries, key=lambda entry: natural_key(entry.name)) if options.sort == "name" else entries)
    if options.sort == "size":
        tree.sort_by_size(root)
    return root


def _totals(entries: list[TensorInfo]) -> dict[str, dict[str, int]]:
    """Returns the number of tensors and parameters and the bytes, of all and of each dtype, the largest first.

    Those of all have the name "".
    """
    totals: dict[str, dict[str, int]] = {"": {"count": 0, "parameters": 0, "nbytes": 0}}
    for entry in entries:
        for dtype in ("", entry.dtype):
            total = totals.setdefault(dtype, {"count": 0, "parameters": 0, "nbytes": 0})
            total["count"] += 1
            total["parameters"] += parameters(entry)
            total["nbytes"] += entry.nbytes
    return dict(sorted(totals.items(), key=lambda item: (item[0] != "", -item[1]["nbytes"], item[0])))


def _print(listing: Listing, entries: list[TensorInfo], options: argparse.Namespace) -> None:
    files = listing.paths()
    size = size_text(listing.nbytes())
    if len(files) > 1:
        print(f"{styled(printable(listing.path), 'bold')}: {len(files)} files, {size}")
    else:
        print(f"{styled(printable(files[0]), 'bold')}: {size}")
    for key, value in sorted((listing.metadata or {}).items()):
        print(f"metadata: {printable(key)} = {value_text(value)}")
    if _wants_tree(options):
        _print_tree(entries, options)
    else:
        _print_tensors(entries, len(files) > 1, options.sort == "size")
    _print_totals(entries)


def _print_tensors(entries: list[TensorInfo], several_files: bool, mixed: bool) -> None:
    """Prints the tensors: file by file, or with their files if those are mixed."""
    # A pipe gets tensors alone.
    titles = ("dtype", "shape", "size", "name", "file") if is_terminal() and entries else ("",) * 5
    columns = [Column(titles[0]), Column(titles[1]), Column(titles[2], ">"), Column(titles[3], shrink=True)]
    if several_files and mixed:
        columns.append(Column(titles[4], shrink=True))
    dtypes = {dtype: styled(dtype, "cyan") for dtype in {entry.dtype for entry in entries}}

    def rows() -> Iterator[list[str] | str]:
        file = None
        for entry in entries:
            if several_files and not mixed and entry.file != file:
                file = entry.file
                yield f"{styled(printable(file), 'bold')}:"
            row = [dtypes[entry.dtype], shape_text(entry.shape), size_text(entry.nbytes), printable(entry.name)]
            yield [*row, printable(entry.file)] if several_files and mixed else row

    print_table(columns, rows())


def _print_tree(entries: list[TensorInfo], options: argparse.Namespace) -> None:
    root = tree.folded(_tree(entries, options))
    if options.sort == "size":
        tree.sort_by_size(root)
    numbers = [Column(title, ">") for title in ("tensors", "parameters", "size")]

    def rows() -> Iterator[list[str]]:
        for level, name, node in tree.lines(root, options.depth):
            title, kind = printable(name), "" if node.entry is None else kind_text(node.entry)
            yield [
                "  " * level + (title if node.entry else styled(title, "bold")),
                f"{node.count:,}",
                f"{node.parameters:,}",
                size_text(node.nbytes),
                kind,
            ]

    print_table([Column("name", shrink=True), *numbers, Column("dtype, shape")], rows())


def _print_totals(entries: list[TensorInfo]) -> None:
    totals = _totals(entries)
    every = totals.pop("")
    count, elements = counted(every["count"], "tensor"), counted(every["parameters"], "parameter")
    print(f"total: {count}, {elements}, {size_text(every['nbytes'])}")

    def rows() -> Iterator[list[str]]:
        for dtype, total in totals.items():
            share = total["nbytes"] / every["nbytes"] if every["nbytes"] else 0.0
            row = [f"{total['count']:,}", f"{total['parameters']:,}", size_text(total["nbytes"]), f"{share:.1%}"]
            yield [styled(dtype, "cyan"), *row]

    if totals:
        titles = ("tensors", "parameters", "size", "share")
        print_table([Column("dtype"), *(Column(title, ">") for title in titles)], rows())
