"""The report of checks and measurements, in Markdown.

Owns the tables and their text. run.py provides the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import bench
import rivals
import targets

MIB = 1 << 20

_WARNING = (
    "**THESE FIGURES MEAN NOTHING.** The device is a simulation on the CPU: its copies are memory copies by one thread,"
    " its memory is the host's. What is shown here is that the checks and the benchmark run, not how fast anything is."
)


def markdown(results: dict[str, Any]) -> str:
    """Returns the whole report."""
    sections = [_head(results)]
    if "checks" in results:
        sections.append(_checks(results["checks"]))
    if "bench" in results:
        found = results["bench"]
        sections += [_works("Loads", found["loads"], rivals.LOADS), _works("Saves", found["saves"], rivals.SAVES)]
        sections += [_ceilings(found), _small_costs(found["loads"])]
    sections.append(_targets(results))
    if results["notes"]:
        sections.append("\n".join(["## Not measured", "", *(f"- {note}" for note in results["notes"])]))
    if results["simulated"]:
        sections.append(_WARNING)
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    heads = list(heads)
    marks = ["---" if index < left else "---:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, marks, *rows))


def time_text(seconds: float) -> str:
    """Formats a time with about three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            value = seconds * factor
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.2f} GB/s"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _head(results: dict[str, Any]) -> str:
    lines = ["# safetensors-torch on a GPU", ""]
    if results["simulated"]:
        lines += [_WARNING, ""]
    lines += [f"{results['date']}, `{results['command']}`", ""]
    packages = {name: version for name, version in results["packages"].items()}
    lines.append(_table(("what", ""), [*results["device"].items(), *results["machine"].items(), *packages.items()], 2))
    return "\n".join(lines)


def _checks(results: list[dict[str, Any]]) -> str:
    counts = {kind: sum(one["result"] == kind for one in results) for kind in ("ok", "FAILED", "skipped")}
    lines = ["## Checks", "", f"{counts['ok']} ok, {counts['FAILED']} failed, {counts['skipped']} skipped", ""]
    rows = [(one["name"], one["result"], _one_line(one.get("why", ""))) for one in results]
    return "\n".join([*lines, _table(("check", "result", "why"), rows, 3)])


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.splitlines() if line.strip()).replace("|", "\\|")


def _works(title: str, entries: list[dict[str, Any]], subjects: tuple[rivals.Subject, ...]) -> str:
    if not entries:
        return ""
    lines = [
        f"## {title}",
        "",
        "Medians of a process's first run, its second, and all later ones. *times* is how many times as long as ours"
        " it took, later and at first; *host* is the host memory that a further run takes at the most.",
    ]
    for measured in entries:
        heads = ("who", "first", "second", "later", "GB/s", "times", "first times", "host")
        heading = f"### {measured['name']}: {measured['title']}, {measured['bytes'] / 1e6:,.1f} MB"
        lines += ["", heading, "", _table(heads, _rows(measured, subjects))]
    return "\n".join(lines)


def _rows(measured: dict[str, Any], subjects: tuple[rivals.Subject, ...]) -> Iterator[tuple[str, ...]]:
    for subject in subjects:
        row = targets.row_of(measured, subject.key)
        if row is None:
            continue
        times = bench.times(row)
        title = row["title"] if row["key"] in rivals.OWN else f"{row['title']} {row['version']}"
        yield (
            title,
            time_text(times["first"]),
            time_text(times["second"]),
            time_text(times["later"]),
            f"{measured['bytes'] / times['later'] / 1e9:.2f}",
            _ratio(targets.times_as_fast(measured, row["key"], "later")),
            _ratio(targets.times_as_fast(measured, row["key"], "first")),
            f"{max(run['host_bytes'] for run in row['runs']) / MIB:,.1f} MiB",
        )


def _ceilings(found: dict[str, Any]) -> str:
    lines = ["## The machine's own limits", ""]
    rows: list[tuple[str, ...]] = []
    measured = {name: limits for name, limits in found["ceilings"].items() if limits}
    if not measured:
        return ""
    first = next(iter(measured.values()))

    def add(what: str, show: Callable[[dict[str, Any]], str]) -> None:
        rows.append((what, *map(show, measured.values())))

    for way in first["copies"]:
        add(f"copy, {way}", lambda limits, way=way: _rate(limits["copies"][way]))
    for count in first["reads"]:
        what = "1 thread" if count == "1" else f"{count} threads"
        add(f"read, {what}", lambda limits, count=count: _rate(limits["reads"][count]))
    add("write, 1 thread", lambda limits: _rate(limits["write"]))
    for size in first["pinning"]:
        add(f"pinning {size} MiB", lambda limits, size=size: f"{limits['pinning'][size] * 1e3:.2f} ms/MiB")
    for load in found["loads"]:
        if load["name"] not in measured:
            continue
        ceiling = targets.slower_ceiling(measured[load["name"]])
        taken = targets.seconds(load, rivals.OURS, "later")
        if ceiling is not None and taken is not None:
            share = load["bytes"] / taken / ceiling
            lines += [f"- load of {load['name']}: {share:.0%} of {_rate(ceiling)}, the slower of copies and reads."]
    lines += ["", _table(("what", *measured), rows)]
    return "\n".join(lines)


def _small_costs(loads: list[dict[str, Any]]) -> str:
    small = next((measured for measured in loads if measured["name"] == "1 MB"), None)
    if small is None:
        return ""
    parts = []
    for key, what in (
        (rivals.RESERVED, "with the pool"),
        (rivals.PLAIN, "without one"),
        (rivals.OURS, "as it comes"),
    ):
        taken = targets.seconds(small, key, "later")
        if taken is not None:
            parts.append(f"{time_text(taken)} {what}")
    reserved = next((run["setup"] for m in loads for run in _runs(m, rivals.RESERVED)), None)
    text = f"What a transfer costs before it moves anything: a load of 1 MB takes {', '.join(parts)}."
    return text + ("" if reserved is None else f" Reserving the whole pinned pool took {time_text(reserved)}.")


def _runs(measured: dict[str, Any], key: str) -> list[dict[str, Any]]:
    row = targets.row_of(measured, key)
    return [] if row is None else row["runs"]


def _targets(results: dict[str, Any]) -> str:
    rows = []
    for verdict in targets.judge(results):
        judged = "not measured" if verdict.found is None else "met" if verdict.met else "**missed**"
        if results["simulated"] and verdict.found is not None:
            judged = "means nothing"
        rows.append((verdict.what, verdict.target, verdict.found or "–", verdict.first or "–", judged))
    lines = [
        "## Targets",
        "",
        "Judged by the later runs; of small files by the first, too. Two medians within"
        f" {targets.NOISE_SHARE:.0%} and {targets.NOISE_SECONDS * 1e6:.0f} µs of each other count as the same.",
        "",
    ]
    return "\n".join([*lines, _table(("what", "target", "found", "first runs", "verdict"), rows, 2)])
