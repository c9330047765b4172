"""Copies some tensors, and all metadata, into a new file. The dtypes and bytes stay as they are."""

from __future__ import annotations

import argparse
import json

from .._headers import copy_tensors
from .._progress import ProgressBar
from .listing import Listing, add_quiet, check_file_target, check_local, counted, size_text, wants_bar
from .terminal import printable

HELP = "copy some tensors into a new file"
EXAMPLES = """examples:
  safetensors-torch extract model.safetensors bias.safetensors "*.bias"
  safetensors-torch extract checkpoint/ two.safetensors layer.weight steps
  safetensors-torch extract model.safetensors bias.safetensors "*.bias" --force --json
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a file, an index (.json), or a directory with either")
    command.add_argument("target", help="the new file, which ends in .safetensors")
    command.add_argument("name", nargs="+", help="the name of a tensor, or a glob, such as '*.bias'")
    command.add_argument("--force", action="store_true", help="replace an existing target")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    check_local(options.source)
    check_file_target(options.target, options.force)
    listing = Listing(options.source)
    names = {entry.name: entry.name for entry in listing.select(options.name)}
    copy(listing, names, listing.metadata, options)
    return 0


def copy(listing: Listing, names: dict[str, str], metadata: dict[str, str] | None, options: argparse.Namespace) -> None:
    """Writes the tensors ``names``, under their new names, into the target of ``options``, and prints the result."""
    with ProgressBar("copy", wants_bar(options)) as report_progress:
        copy_tensors(listing.path, names, metadata, options.target, report_progress)
    nbytes = sum(listing.entries[name].nbytes for name in names)
    if options.json:
        print(json.dumps({"file": options.target, "names": names, "count": len(names), "nbytes": nbytes}, indent=2))
        return
    for old, new in names.items():
        if old != new:
            print(f"{printable(old)} -> {printable(new)}")
    print(f"{printable(options.target)}: {counted(len(names), 'tensor')}, {size_text(nbytes)}")
