"""Verifies files or checkpoints: each header, the index against its files, that every byte can be read, and checksums
if a list is given. Prints the faults last; the status is then 1, or 2 if a path does not exist.

Checksums are SHA-256 of whole files, in the format of sha256sum, with names relative to the directory of the list.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from .._exceptions import SafetensorError
from .._progress import ProgressBar
from .listing import Listing, add_quiet, check_local, size_text, wants_bar
from .terminal import printable, printable_text

HELP = "check structure, readability and checksums"
EXAMPLES = """examples:
  safetensors-torch verify model.safetensors checkpoint/
  safetensors-torch verify checkpoint/ --write-checksums checkpoint/SHA256SUMS
  safetensors-torch verify checkpoint/ --checksums checkpoint/SHA256SUMS
"""

_PIECE = 8 << 20


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", nargs="+", help="a file, an index (.json), or a directory with either")
    command.add_argument("--header-only", action="store_true", help="do not read the data")
    command.add_argument("--checksums", metavar="FILE", help="a list that sha256sum or --write-checksums made")
    command.add_argument("--write-checksums", metavar="FILE", help="write such a list of the files")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    if options.header_only and (options.checksums or options.write_checksums):
        raise ValueError("checksums need all bytes: leave --header-only out")
    for path in options.path:
        check_local(path)
    expected = _read_list(options.checksums) if options.checksums else None
    digests = bool(options.checksums or options.write_checksums)
    results, sums = [], {}
    with ProgressBar("verify", wants_bar(options)) as report_progress:
        files = _files(options.path, results)
        total, done = sum(os.path.getsize(file) for file in files), 0
        for file in files:
            fault, digest = None, None
            if not options.header_only:
                try:
                    digest = _read(file, lambda count, before=done: report_progress(before + count, total), digests)
                except OSError as error:
                    fault = f"cannot be read: {error}"
            if digest is not None:
                sums[file] = digest
                fault = _compare(file, digest, expected)
            done += os.path.getsize(file)
            results.append({"path": file, "ok": fault is None, "fault": fault, "sha256": digest})
    results.sort(key=lambda result: not result["ok"])
    if options.write_checksums and all(result["ok"] for result in results):
        _write_list(options.write_checksums, sums)
    _report(results, options.json)
    if all(result["ok"] for result in results):
        return 0
    # A missing path is not a damaged file.
    return 1 if all(os.path.exists(path) for path in options.path) else 2


def _files(paths: list[str], results: list[dict[str, Any]]) -> list[str]:
    """Returns the files of ``paths`` with valid headers, each once; adds the faults of the others to ``results``."""
    files: dict[str, None] = {}
    for path in paths:
        try:
            listing = Listing(path)
        except (SafetensorError, OSError) as error:
            results.append({"path": path, "ok": False, "fault": str(error), "sha256": None})
            continue
        files.update(dict.fromkeys(listing.paths()))
    return list(files)


def _read(file: str, report_progress: Callable[[int], None], with_digest: bool) -> str | None:
    """Reads all of ``file``, and returns its checksum if ``with_digest``."""
    digest, piece, done = hashlib.sha256(), memoryview(bytearray(_PIECE)), 0
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            if with_digest:
                digest.update(piece[:count])
            done += count
            report_progress(done)
    return digest.hexdigest() if with_digest else None


def _compare(file: str, digest: str, expected: dict[str, str] | None) -> str | None:
    if expected is None:
        return None
    wanted = expected.get(os.path.realpath(file))
    if wanted is None:
        return "the list of checksums lacks it"
    return (
        None
        if wanted == digest
        else f"its checksum is {digest}, not {wanted}: the data is damaged, or belongs to another file"
    )


def _read_list(path: str) -> dict[str, str]:
    """Returns the checksums of a list, by the real paths of the files."""
    directory, sums = os.path.dirname(path), {}
    try:
        lines = open(path, encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{error.strerror}: {path!r}; --write-checksums FILE writes such a list") from None
    with lines:
        for number, line in enumerate(lines, 1):
            digest, _, name = line.rstrip("\n").partition(" ")
            if not name:
                continue
            if len(digest) != 64 or name[0] not in " *" or set(digest.lower()) - set("0123456789abcdef"):
                raise ValueError(f"{path}, line {number}: not `SHA256  NAME`, as sha256sum writes it")
            sums[os.path.realpath(os.path.join(directory, name[1:]))] = digest.lower()
    return sums


def _write_list(path: str, sums: dict[str, str]) -> None:
    directory = os.path.dirname(os.path.realpath(path))
    lines = [f"{digest}  {os.path.relpath(os.path.realpath(file), directory)}\n" for file, digest in sums.items()]
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as out:
        out.writelines(lines)


def _report(results: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        if result["ok"]:
            print(f"ok      {printable(result['path'])}  {size_text(os.path.getsize(result['path']))}")
        else:
            # The core's errors name the path, or the file of a checkpoint.
            path, fault = printable(result["path"]), printable_text(result["fault"])
            print(f"FAILED  {fault}" if path in fault else f"FAILED  {path}: {fault}")
