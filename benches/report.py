"""Tables of the results: as text, and as Markdown for the documentation.

Owns the derived figures (medians, ratios, copies, targets). Measures nothing. plot.py draws the plot.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import works
from data import DATA_SETS
from works import TARGETS, Target

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
_COLUMNS = ("median", "min", "ratio", "GB/s", "copies")


def median(row: dict | None) -> float | None:
    """Returns the median of a row, or None if it has no runs."""
    return statistics.median(row["seconds"]) if row and row["seconds"] else None


def row_of(work: dict | None, subject: str) -> dict | None:
    """Returns a subject's row of a work, or None if it was not measured."""
    return next((row for row in work["rows"] if row["subject"] == subject), None) if work else None


def relative(work: dict | None, subject: str, other: str) -> float | None:
    """Returns the time of `subject` as a multiple of that of `other`."""
    mine, theirs = median(row_of(work, subject)), median(row_of(work, other))
    return mine / theirs if mine and theirs else None


def copies(work: dict | None, subject: str) -> float | None:
    """Returns the extra anonymous memory of a subject, in copies of the data."""
    row = row_of(work, subject)
    return row["extra_bytes"] / work["bytes"] if row and row["extra_bytes"] is not None else None


def time_text(seconds: float) -> str:
    """Formats a time with at least three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:#.3g} {unit}".replace(". ", " ")
    return f"{seconds * 1e6:.0f} µs"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{0 if abs(value) >= 100 else digits}f}"


def _cells(work: dict, row: dict) -> tuple[str, ...]:
    """Formats the cells of a row, in the order of the columns."""
    speed = work["bytes"] / median(row) / 1e9 if work["moves"] else None
    return (
        time_text(median(row)),
        time_text(min(row["seconds"])),
        _number(relative(work, row["subject"], works.OURS)),
        _number(speed),
        _number(copies(work, row["subject"])),
    )


def text_table(entries: list[dict]) -> str:
    """Returns the rows of the works for a terminal."""
    lines = []
    for work in entries:
        lines.append(f"\n{work['name']:<38}" + "".join(f"{column:>10}" for column in _COLUMNS))
        for row in work["rows"]:
            if row["seconds"]:
                lines.append(f"  {row['subject']:<36}" + "".join(f"{cell:>10}" for cell in _cells(work, row)))
    return "\n".join(lines)


def scales(results: dict) -> Iterator[tuple[str, float]]:
    """Returns the works of a million tensors, with their time as a multiple of 50 times that of 20,000."""
    by_name = {work["name"]: work for work in results["works"]}
    for work in results["works"]:
        small = median(row_of(by_name.get(f"small {work['title']}"), works.OURS))
        large = median(row_of(work, works.OURS))
        if work["data"] == "million" and small and large:
            yield work["name"], large / (50 * small)


def judged(results: dict) -> Iterator[tuple[str, str, str, str]]:
    """Returns the measured targets: work, target, result, and whether it is met."""
    by_name = {work["name"]: work for work in results["works"]}
    scale = dict(scales(results))
    for target in TARGETS:
        value = _measured(target, by_name.get(target.work), scale)
        if value is not None:
            met = value <= target.value if target.at_most else value >= target.value
            what, form = {
                "times": (f"{target.work}: times as fast as {works.REFERENCE}", "{:,.2f}"),
                "raw": (f"{target.work}: share of the raw limit", "{:.0%}"),
                "copies": (f"{target.work}: extra copies", "{:.2f}"),
                "scale": (f"{target.work}: time, in 50 times that of 20,000", "{:.2f}"),
            }[target.kind]
            bound = "at most" if target.at_most else "at least"
            yield what, f"{bound} {form.format(target.value)}", form.format(value), "yes" if met else "no"


def _measured(target: Target, work: dict | None, scale: dict[str, float]) -> float | None:
    if target.kind == "times":
        return relative(work, works.REFERENCE, works.OURS)
    if target.kind == "raw":
        return relative(work, works.RAW, works.OURS)
    return copies(work, works.OURS) if target.kind == "copies" else scale.get(target.work)


def text_targets(results: dict) -> str:
    """Returns the targets for a terminal."""
    lines = [f"\n{'targets':<72}{'target':>16}{'measured':>10}  met"]
    lines += [f"{what:<72}{target:>16}{value:>10}  {met}" for what, target, value, met in judged(results)]
    return "\n".join(lines)


def _markdown_rows(heads: tuple[str, ...], rows: list[tuple[str, ...]], left: int) -> list[str]:
    marks = ["---" if index < left else "---:" for index in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, marks, *rows)]


def markdown(results: dict, plot: str) -> str:
    """Returns the text between the markers of a document."""
    few = ", ".join(f"{data.most_rounds} with {name}" for name, data in DATA_SETS.items() if data.most_rounds < 1000)
    rounds = f"{results['rounds']} timed runs of each, at most {few}"
    lines = [f"Measured on {results['date']} with `{results['command']}`: {rounds}.", ""]
    lines += _markdown_rows(("machine", ""), list(results["machine"].items()), 2)
    lines += ["", f"![Speed relative to {works.REFERENCE}]({plot})", ""]
    for name, data in DATA_SETS.items():
        rows: list[tuple[str, ...]] = []
        for work in (work for work in results["works"] if work["data"] == name):
            measured = [row for row in work["rows"] if row["seconds"]]
            for index, row in enumerate(measured):
                rows.append((work["title"] if index == 0 else "", row["subject"], *_cells(work, row)))
        if rows:
            lines += [f"### {data.title[0].upper()}{data.title[1:]}: {data.nbytes() / 1e6:,.0f} MB", ""]
            lines += [*_markdown_rows(("work", "subject", *_COLUMNS), rows, 2), ""]
    lines += ["### Targets", "", *_markdown_rows(("measure", "target", "measured", "met"), list(judged(results)), 1)]
    lines += ["", *(f"- {note}." for note in [*results["notes"], *map(_first_line, results["failures"])])]
    return "\n".join(lines).rstrip() + "\n"


def _first_line(failure: str) -> str:
    return f"Failed: {failure.splitlines()[0]}"


def write_docs(results: dict, document: Path) -> None:
    """Replaces the text between the markers of `document`, and draws the plot beside it."""
    import plot

    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{document} needs the line {BEGIN} once, and {END} after it, to be filled between them")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    picture = document.with_suffix(".svg")
    plot.draw(results, picture)
    filled = f"{before}{BEGIN}\n\n{markdown(results, picture.name)}\n{END}{after}"
    document.write_text(filled, encoding="utf-8")
