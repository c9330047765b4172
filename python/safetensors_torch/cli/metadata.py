"""Prints or changes the metadata of files and checkpoints. The tensors stay as they are.

  metadata [get] PATH [KEY]           prints all entries, or the value of a key
  metadata set PATH KEY=VALUE ...     adds or replaces entries
  metadata remove PATH KEY ...        removes entries

A change of a checkpoint changes each of its files, one after the other.
"""

from __future__ import annotations

import argparse
import json
import signal

from .._headers import edit_metadata
from .listing import Listing, NoMatchError, check_local, near
from .terminal import printable, printable_text

HELP = "print, set and remove metadata"
EXAMPLES = """examples:
  safetensors-torch metadata get model.safetensors
  safetensors-torch metadata set model.safetensors author=me "note=trained on one GPU"
  safetensors-torch metadata remove model.safetensors author
"""

ACTIONS = ("get", "set", "remove")
_OTHER_NAMES = {
    **dict.fromkeys(("show", "list", "ls", "print", "read"), "get"),
    **dict.fromkeys(("add", "edit", "put", "update", "write"), "set"),
    **dict.fromkeys(("rm", "delete", "del", "unset"), "remove"),
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("action", type=_action, help="get, set or remove")
    command.add_argument("path", help="a file, an index (.json), or a directory with either")
    command.add_argument("entry", nargs="*", default=[], help="KEY=VALUE for set, KEY for the others")
    command.add_argument(
        "--in-place", action="store_true", help="overwrite the header only: fast, but a power cut can tear it"
    )


def _action(text: str) -> str:
    if text in ACTIONS:
        return text
    meant = _OTHER_NAMES.get(text) or near(text, ACTIONS)
    instead = f"did you mean {meant}?" if meant else f"choose from {', '.join(ACTIONS)}"
    raise argparse.ArgumentTypeError(f"{text}: unknown action; {instead}")


def run(options: argparse.Namespace) -> int:
    if options.action != "get":
        check_local(options.path)
    listing = Listing(options.path)
    metadata = listing.metadata or {}
    if options.action == "get":
        return _get(options, metadata)
    changes: dict[str, str | None]
    if options.action == "set":
        changes = dict(_parse(entry, options.entry) for entry in options.entry)
        if not changes:
            raise ValueError("set needs KEY=VALUE, such as epoch=3")
    else:
        if not options.entry:
            raise ValueError(f"remove needs a KEY; {options.path} has {_keys(metadata)}")
        _check_keys(options.path, metadata, options.entry)
        changes = dict.fromkeys(options.entry)
    # The library copies a file in one call, which Python's handler of Ctrl-C would wait for.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        for path in listing.paths():
            edit_metadata(path, changes, options.in_place)
    finally:
        signal.signal(signal.SIGINT, handler)
    changed = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    _print(changed, options.json)
    return 0


def _get(options: argparse.Namespace, metadata: dict[str, str]) -> int:
    _check_keys(options.path, metadata, options.entry)
    found = {key: metadata[key] for key in options.entry or metadata}
    if len(options.entry) == 1 and not options.json:
        (value,) = found.values()
        print(printable_text(value))
    else:
        _print(found, options.json)
    return 0


def _print(metadata: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(metadata, indent=2))
        return
    for key, value in sorted(metadata.items()):
        print(f"{printable(key)} = {printable_text(value)}")


def _parse(entry: str, entries: list[str]) -> tuple[str, str]:
    key, equals, value = entry.partition("=")
    if not equals:
        written = "=".join(entries) if len(entries) == 2 else f"{entry}=VALUE"
        raise ValueError(f"{entry}: not KEY=VALUE; write {written}")
    return key, value


def _check_keys(path: str, metadata: dict[str, str], keys: list[str]) -> None:
    for key in keys:
        if key not in metadata:
            raise NoMatchError(f"{path}: no metadata key {key!r}; it has {_keys(metadata)}")


def _keys(metadata: dict[str, str]) -> str:
    return ", ".join(sorted(metadata)) or "no metadata"
