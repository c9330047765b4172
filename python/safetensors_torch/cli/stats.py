"""Computes statistics of tensors: minimum, maximum, mean and standard deviation of the finite values, and how many are
zero, NaN or infinite. Reads all data, and holds little of it. With --check, the status is 1 if a value is NaN or
infinite.

Names may be globs, such as '*.bias'. The standard deviation has Bessel's correction, as that of torch. Each element of
C64 is two values, its parts.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from .._headers import TensorInfo
from .._progress import ProgressBar
from .._statistics import Statistics, iterate_statistics
from .listing import Listing, add_quiet, counted, natural_key, size_text, wants_bar
from .terminal import Column, print_table, printable, styled

HELP = "compute min, max, mean, std, zeros, NaN and Inf of tensors"
EXAMPLES = """examples:
  safetensors-torch stats model.safetensors
  safetensors-torch stats checkpoint/ layer.weight "*.bias" --json
  safetensors-torch stats checkpoint/model.safetensors.index.json --check
"""

_MOST_NAMED = 5

_COLUMNS = (
    *(Column(title, ">") for title in ("min", "max", "mean", "std", "zeros", "NaN", "Inf")),
    Column("dtype"),
    Column("name", shrink=True),
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", help="a file, an index (.json), or a directory with either; or a URL")
    command.add_argument("name", nargs="*", help="a tensor, or a glob; default: all tensors")
    command.add_argument("--check", action="store_true", help="return 1 if a value is NaN or infinite")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    listing = Listing(options.path)
    entries = listing.select(options.name) if options.name else list(listing.entries.values())
    entries.sort(key=lambda entry: (entry.file, natural_key(entry.name)))
    names = {entry.name for entry in entries} if options.name else None
    with ProgressBar("stats", wants_bar(options)) as report_progress:
        found = dict(iterate_statistics(listing.location, names, report_progress=report_progress))
    rows = [(entry, found[entry.name]) for entry in entries]
    bad = [entry.name for entry, statistics in rows if statistics and statistics.nans + statistics.infs]
    if options.json:
        tensors = [_as_json(entry, statistics) for entry, statistics in rows]
        print(json.dumps({"path": listing.path, "finite": not bad, "tensors": tensors}, indent=2))
    else:
        _print(rows)
        if options.check:
            _print_verdict(bad)
    return 1 if options.check and bad else 0


def _as_json(entry: TensorInfo, statistics: Statistics | None) -> dict[str, Any]:
    values = dict.fromkeys(("count", "zeros", "nan", "inf", "min", "max", "mean", "std"))
    if statistics is not None:
        values = dict(zip(values, statistics[: len(values)], strict=True))
        if values["std"] is not None and not math.isfinite(values["std"]):
            values["std"] = None  # JSON has no infinity
    return {"name": entry.name, "dtype": entry.dtype, "shape": entry.shape, "file": entry.file, **values}


def _print(rows: list[tuple[TensorInfo, Statistics | None]]) -> None:
    print_table(_COLUMNS, [_cells(entry, statistics) for entry, statistics in rows])
    known = [statistics for _, statistics in rows if statistics is not None]
    count, zeros, nans, infs = (sum(statistics[index] for statistics in known) for index in range(4))
    size = size_text(sum(entry.nbytes for entry, _ in rows))
    print(f"total: {counted(len(rows), 'tensor')}, {counted(count, 'value')}, {size}")
    print(f"{counted(zeros, 'zero')}, {nans:,} NaN, {infs:,} Inf")
    if len(known) < len(rows):
        dtypes = sorted({entry.dtype for entry, statistics in rows if statistics is None})
        print(
            f"without statistics: {counted(len(rows) - len(known), 'tensor')} of {', '.join(dtypes)}, whose elements"
            " the format does not define"
        )


def _cells(entry: TensorInfo, statistics: Statistics | None) -> list[str]:
    last = [entry.dtype, printable(entry.name)]
    if statistics is None:
        return [*["-"] * 7, *last]
    values = statistics.minimum, statistics.maximum, statistics.mean, statistics.std
    numbers = ["-" if value is None else f"{value:.4g}" for value in values]
    bad = [styled(str(count), "bold red") if count else "0" for count in (statistics.nans, statistics.infs)]
    return [*numbers, str(statistics.zeros), *bad, *last]


def _print_verdict(bad: list[str]) -> None:
    if not bad:
        print(f"check: {styled('no NaN and no Inf', 'green')}")
        return
    first = ", ".join(map(printable, bad[:_MOST_NAMED])) + (", ..." if len(bad) > _MOST_NAMED else "")
    verdict = styled(f"NaN or Inf in {counted(len(bad), 'tensor')}", "bold red")
    print(f"check: {verdict}: {first}")
