"""Lists the tensors of files or checkpoints: dtype, shape, size and name, then metadata and totals. No data is read."""

from __future__ import annotations

import argparse
import fnmatch
import json

from .listing import Listing, printable, shape_text, size_text

HELP = "list tensors, metadata and sizes"
EXAMPLES = """examples:
  python -m safetensors_torch ls model.safetensors
  python -m safetensors_torch ls checkpoint/ --sort size --match "*.weight"
  python -m safetensors_torch ls checkpoint/model.safetensors.index.json --json
"""

_ORDERS = {
    "offset": lambda entry: (entry.file, entry.begin),
    "name": lambda entry: entry.name,
    "size": lambda entry: (-entry.nbytes, entry.name),
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", nargs="+", help="a file, an index (.json), or a directory with either")
    command.add_argument(
        "--sort", choices=_ORDERS, default="offset", help="the order of the tensors (default: %(default)s)"
    )
    command.add_argument(
        "--match", metavar="GLOB", default="*", help="list only tensors whose names match, such as '*.bias'"
    )


def run(options: argparse.Namespace) -> int:
    results = []
    for path in options.path:
        listing = Listing(path)
        entries = [entry for entry in listing.entries.values() if fnmatch.fnmatchcase(entry.name, options.match)]
        entries.sort(key=_ORDERS[options.sort])
        if not options.json:
            _print(listing, entries, with_path=len(options.path) > 1)
        results.append(
            {
                "path": path,
                "files": listing.files,
                "metadata": listing.metadata,
                "tensors": [entry._asdict() for entry in entries],
                "count": len(entries),
                "nbytes": sum(entry.nbytes for entry in entries),
            }
        )
    if options.json:
        print(json.dumps(results, indent=2))
    return 0


def _print(listing: Listing, entries: list, with_path: bool) -> None:
    if with_path:
        print(f"{printable(listing.path)}:")
    rows = [(entry.dtype, shape_text(entry.shape), size_text(entry.nbytes), entry) for entry in entries]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for dtype, shape, size, entry in rows:
        where = f"  {printable(entry.file)}" if len(listing.files) > 1 else ""
        print(f"{dtype:{widths[0]}}  {shape:{widths[1]}}  {size:>{widths[2]}}  {printable(entry.name)}{where}")
    for key, value in sorted((listing.metadata or {}).items()):
        print(f"metadata {printable(key)} = {printable(value)}")
    files = f" in {len(listing.files)} files" if len(listing.files) > 1 else ""
    total = sum(entry.nbytes for entry in entries)
    print(f"{len(entries)} tensor(s), {size_text(total)} ({total} bytes){files}")
