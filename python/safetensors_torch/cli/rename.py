"""Copies a checkpoint into a new file in which the tensors have other names. The rules apply to each name in turn.

A rule is s/OLD/NEW/, as in sed: it replaces the first match of the regular expression OLD, or every match with a g at
its end. NEW may contain groups, such as \\1. Any character may stand for the slashes. The expressions are Python's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from .extract import copy
from .listing import Listing, NoMatchError, add_quiet, check_file_target, check_local, command_text

HELP = "copy under other names"
EXAMPLES = r"""examples:
  safetensors-torch rename model.safetensors renamed.safetensors 's/^layer\./encoder.layer./'
  safetensors-torch rename model.safetensors prefixed.safetensors 's/^/model./'
  safetensors-torch rename prefixed.safetensors prefixed.safetensors 's/^model\.//' --force
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a file, an index (.json), or a directory with either")
    command.add_argument("target", help="the new file, which ends in .safetensors")
    command.add_argument("rule", nargs="+", metavar="s/OLD/NEW/", help="a rule; s/OLD/NEW/g for every match")
    command.add_argument("--force", action="store_true", help="replace an existing target, which may be the source")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    rules = [_parse(rule) for rule in options.rule]
    check_local(options.source)
    check_file_target(options.target, options.force)
    listing = Listing(options.source)

    def renamed(name: str) -> str:
        for rule in rules:
            name = rule(name)
        return name

    names = {name: renamed(name) for name in listing.entries}
    if all(old == new for old, new in names.items()):
        raise NoMatchError(f"{options.source}: no name changes; {command_text('ls', options.source)} lists the names")
    olds: dict[str, str] = {}
    for old, new in names.items():
        if olds.setdefault(new, old) != old:
            raise ValueError(f"two tensors would be called {new!r}: {olds[new]!r} and {old!r}")
    copy(listing, names, _metadata(listing, names, renamed), options)
    return 0


def _metadata(listing: Listing, names: dict[str, str], renamed: Callable[[str], str]) -> dict[str, str] | None:
    """Returns the metadata, with new names where save_model recorded which tensor a tied name shares."""
    if listing.metadata is None:
        return None
    return {
        renamed(key) if value in names and key != "format" else key: names.get(value, value)
        for key, value in listing.metadata.items()
    }


def _parse(text: str) -> Callable[[str], str]:
    """Returns the function that applies a rule to a name."""
    delimiter = text[1:2]
    parts = re.split(rf"(?<!\\){re.escape(delimiter)}", text[2:]) if delimiter else []
    if text[:1] != "s" or delimiter.isalnum() or len(parts) != 3 or parts[2] not in ("", "g"):
        raise ValueError(rf"{text}: not a rule; write s/OLD/NEW/, such as s/^model\.//")
    old, new = (part.replace("\\" + delimiter, delimiter) for part in parts[:2])
    count = 0 if parts[2] else 1

    def replace(name: str) -> str:
        try:
            return re.sub(old, new, name, count=count)
        except (re.error, IndexError) as error:  # IndexError for a group that OLD lacks
            raise ValueError(f"{text}: not a regular expression and its replacement: {error}") from None

    return replace
