"""Lists the tensors of files or checkpoints: dtype, shape, size and name, file by file. Before them the sizes of the
files and the metadata, after them the totals. No data is read.
"""

from __future__ import annotations

import argparse
import json
import os

from .._headers import TensorInfo
from .._locations import is_url
from .listing import (
    Listing,
    NoMatchError,
    counted,
    natural_key,
    parameters,
    printable,
    shape_text,
    size_text,
    value_text,
)

HELP = "list tensors, metadata and sizes"
EXAMPLES = """examples:
  safetensors-torch ls model.safetensors
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
    command.add_argument(
        "--sort", choices=_ORDERS, default="name", help="the order of the tensors (default: %(default)s)"
    )
    command.add_argument(
        "--match", metavar="GLOB", action="append", help="list only tensors whose names match, such as '*.bias'"
    )


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
            results.append(_result(listing, entries))
        else:
            _print(listing, entries, by_file=options.sort != "size" and len(listing.files) > 1)
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


def _result(listing: Listing, entries: list[TensorInfo]) -> dict:
    return {
        "path": listing.path,
        "files": listing.files,
        "metadata": listing.metadata,
        "tensors": [entry._asdict() for entry in entries],
        "count": len(entries),
        "parameters": sum(parameters(entry) for entry in entries),
        "nbytes": sum(entry.nbytes for entry in entries),
    }


def _print(listing: Listing, entries: list[TensorInfo], by_file: bool) -> None:
    files = listing.paths()
    size = size_text(listing.nbytes())
    if len(files) > 1:
        print(f"{printable(listing.path)}: {len(files)} files, {size}")
    else:
        print(f"{printable(files[0])}: {size}")
    for key, value in sorted((listing.metadata or {}).items()):
        print(f"metadata: {printable(key)} = {value_text(value)}")
    rows = [(entry.dtype, shape_text(entry.shape), size_text(entry.nbytes), entry) for entry in entries]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    file = None
    for dtype, shape, size, entry in rows:
        if by_file and entry.file != file:
            file = entry.file
            print(f"{printable(file)}:")
        where = f"  {printable(entry.file)}" if len(files) > 1 and not by_file else ""
        print(f"{dtype:{widths[0]}}  {shape:{widths[1]}}  {size:>{widths[2]}}  {printable(entry.name)}{where}")
    print(f"total: {_total(entries)}")
    for dtype in sorted({entry.dtype for entry in entries}):
        print(f"{dtype}: {_total([entry for entry in entries if entry.dtype == dtype])}")


def _total(entries: list[TensorInfo]) -> str:
    size = size_text(sum(entry.nbytes for entry in entries))
    return f"{counted(len(entries), 'tensor')}, {counted(sum(map(parameters, entries)), 'parameter')}, {size}"
