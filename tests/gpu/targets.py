"""The targets, and whether they were met.

Owns the targets and the figures that they use. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bench
import rivals

MIB = 1 << 20
SLAB = 2 * MIB

REFERENCE_TIMES = 5.0
PREFETCH_TIMES = 1.2
CEILING_SHARE = 0.85
SAVE_TIMES = 3.0
HOST_BYTES = 64 * MIB
# How much two medians of the same work may differ, as a share and in seconds.
NOISE_SHARE, NOISE_SECONDS = 0.05, 100e-6

_HOST_FIGURES = ("load_host_bytes", "pread_load_host_bytes", "converting_load_host_bytes", "save_host_bytes")
_DEVICE_FIGURES = ("load_device_bytes", "converting_load_device_bytes", "load_model_device_bytes")


@dataclass(frozen=True)
class Verdict:
    """One target and its result, which is empty if it was not measured."""

    what: str
    target: str
    found: str | None
    first: str  # the result of the first run of a process, if that exists
    met: bool


def row_of(measured: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Returns a subject's row, or None if it was not measured."""
    return next((row for row in measured["rows"] if row["key"] == key), None)


def seconds(measured: dict[str, Any], key: str, when: str) -> float | None:
    """Returns a subject's median: of the "first" run of a process, the "second" or all "later" ones."""
    row = row_of(measured, key)
    return None if row is None else bench.times(row)[when]


def times_as_fast(measured: dict[str, Any], key: str, when: str) -> float | None:
    """Returns the speed of this library as a multiple of a subject's."""
    theirs, ours = seconds(measured, key, when), seconds(measured, rivals.OURS, when)
    return None if theirs is None or ours is None else theirs / ours


def slower_ceiling(limits: dict[str, Any]) -> float | None:
    """Returns the bytes per second of a pinned copy to the device or of parallel reads, whichever is slower."""
    if not limits:
        return None
    return min(limits["copies"]["pinned to device"], max(limits["reads"].values()))


def judge(results: dict[str, Any]) -> list[Verdict]:
    """Returns all targets."""
    found = results.get("bench", {"loads": [], "saves": [], "ceilings": {}})
    large = [measured for measured in found["loads"] if measured["name"] in found["ceilings"]]
    small = [measured for measured in found["loads"] if measured["name"] not in found["ceilings"]]
    return [
        *_faster("load", large, rivals.REFERENCE, REFERENCE_TIMES),
        *_faster("load", large, rivals.PREFETCH, PREFETCH_TIMES),
        *_near_ceiling(large, found["ceilings"]),
        *_faster("save", found["saves"], rivals.REFERENCE, SAVE_TIMES),
        _memory(results, "host memory beyond the pinned pool", _HOST_FIGURES, HOST_BYTES),
        _memory(results, "device memory beyond the tensors", _DEVICE_FIGURES, SLAB),
        *_small(small),
    ]


def _faster(work: str, entries: list[dict[str, Any]], key: str, target: float) -> Iterator[Verdict]:
    subjects = rivals.LOADS if work == "load" else rivals.SAVES
    title = next(subject.title for subject in subjects if subject.key == key)
    wanted = f"at least {target:g} times as fast"
    if not entries:
        yield Verdict(f"{work}, {title}", wanted, None, "", False)
    for measured in entries:
        row = row_of(measured, key)
        version = "" if row is None else f" {row['version']}"
        later, first = (times_as_fast(measured, key, when) for when in ("later", "first"))
        yield Verdict(
            f"{work} of {measured['name']}: {title}{version}",
            wanted,
            None if later is None else f"{later:.2f}",
            "" if first is None else f"{first:.2f}",
            later is not None and later >= target,
        )


def _near_ceiling(entries: list[dict[str, Any]], ceilings: dict[str, Any]) -> Iterator[Verdict]:
    wanted = f"at least {CEILING_SHARE:.0%}"
    if not entries:
        yield Verdict("load: share of the slower ceiling", wanted, None, "", False)
    for measured in entries:
        ceiling = slower_ceiling(ceilings[measured["name"]])
        shares = []
        for when in ("later", "first"):
            taken = seconds(measured, rivals.OURS, when)
            shares.append(None if taken is None or ceiling is None else measured["bytes"] / taken / ceiling)
        later, first = shares
        yield Verdict(
            f"load of {measured['name']}: share of the slower ceiling",
            wanted,
            None if later is None else f"{later:.0%}",
            "" if first is None else f"{first:.0%}",
            later is not None and later >= CEILING_SHARE,
        )


def _memory(results: dict[str, Any], what: str, names: tuple[str, ...], most: int) -> Verdict:
    figures: dict[str, float] = {}
    for one in results.get("checks", []):
        figures.update(one.get("figures", {}))
    found = [figures[name] for name in names if name in figures]
    complete = len(found) == len(names)
    return Verdict(
        what,
        f"at most {most / MIB:g} MiB",
        f"{max(found) / MIB:.1f} MiB" if complete else None,
        "",
        complete and max(found) <= most,
    )


def _small(entries: list[dict[str, Any]]) -> Iterator[Verdict]:
    wanted = "no slower than the plain path"
    if not entries:
        yield Verdict("load of small files", wanted, None, "", False)
    for measured in entries:
        found = []
        for when in ("later", "first"):
            plain, ours = seconds(measured, rivals.PLAIN, when), seconds(measured, rivals.OURS, when)
            found.append(None if plain is None or ours is None else (ours / plain, _not_slower(ours, plain)))
        later, first = found
        yield Verdict(
            f"load of {measured['name']}, {measured['tensors']:,} tensors: time, in those of pinned_pool_bytes=0",
            wanted,
            None if later is None else f"{later[0]:.2f}",
            "" if first is None else f"{first[0]:.2f}",
            later is not None and first is not None and later[1] and first[1],
        )


def _not_slower(ours: float, plain: float) -> bool:
    return ours <= plain * (1 + NOISE_SHARE) + NOISE_SECONDS
