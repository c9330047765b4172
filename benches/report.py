"""Tables of the results: as text, and as Markdown for the documentation.

Owns the derived figures (medians, ratios, copies, targets). Measures nothing. plot.py draws the plot.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import works
from data import DATA_SETS
from works import TARGETS, Target

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
_COLUMNS = ("median", "min", "ratio", "GB/s", "copies")
# Columns of some works: the time to the first tensor, and the bytes that the filesystem read, in needed ones.
_FIRST, _SERVED = "first", "served"


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


def best(work: dict | None, is_meant: Callable[[str], bool]) -> str | None:
    """Returns the fastest of the subjects that are meant, or None if none was measured."""
    rows = [row for row in work["rows"] if is_meant(row["subject"]) and row["seconds"]] if work else []
    return min(rows, key=median)["subject"] if rows else None


def is_raw(subject: str) -> bool:
    """Returns whether a subject is a raw limit."""
    return subject.startswith(works.RAW)


def is_rival(subject: str) -> bool:
    """Returns whether a subject is another library."""
    return not is_raw(subject) and not subject.startswith(works.OURS)


def copies(work: dict | None, subject: str) -> float | None:
    """Returns the extra anonymous memory of a subject, in copies of the data."""
    row = row_of(work, subject)
    return row["extra_bytes"] / work["bytes"] if row and row["extra_bytes"] is not None else None


def served(work: dict | None, subject: str) -> float | None:
    """Returns the bytes that the filesystem read for a subject, as a multiple of those that it needs."""
    row = row_of(work, subject)
    return row["served_bytes"] / work["bytes"] if row and row.get("served_bytes") is not None else None


def time_text(seconds: float) -> str:
    """Formats a time with at least three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:#.3g} {unit}".replace(". ", " ")
    return f"{seconds * 1e6:.0f} µs"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{0 if abs(value) >= 100 else digits}f}"


def _columns(entries: list[dict]) -> tuple[str, ...]:
    """Returns the columns of a table of these works."""
    rows = [row for work in entries for row in work["rows"]]
    extra = {_FIRST: "first_seconds", _SERVED: "served_bytes"}
    return (*_COLUMNS, *(column for column, key in extra.items() if any(row.get(key) for row in rows)))


def _cells(work: dict, row: dict, columns: tuple[str, ...]) -> tuple[str, ...]:
    """Formats the cells of a row."""
    first = row.get("first_seconds")
    cells = {
        "median": time_text(median(row)),
        "min": time_text(min(row["seconds"])),
        "ratio": _number(relative(work, row["subject"], works.OURS)),
        "GB/s": _number(work["bytes"] / median(row) / 1e9 if work["moves"] else None),
        "copies": _number(copies(work, row["subject"])),
        _FIRST: time_text(statistics.median(first)) if first else "–",
        _SERVED: _number(served(work, row["subject"])),
    }
    return tuple(cells[column] for column in columns)


def text_table(entries: list[dict]) -> str:
    """Returns the rows of the works for a terminal."""
    lines = []
    for work in entries:
        columns = _columns([work])
        lines.append(f"\n{work['name']:<48}" + "".join(f"{column:>10}" for column in columns))
        for row in work["rows"]:
            if row["seconds"]:
                cells = "".join(f"{cell:>10}" for cell in _cells(work, row, columns))
                lines.append(f"  {row['subject']:<46}{cells}")
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
                "rival": (f"{target.work}: times as fast as the best rival", "{:,.2f}"),
                "each": (f"{target.work}: times as fast as one file after the other", "{:,.2f}"),
                "raw": (f"{target.work}: share of the best raw limit", "{:.0%}"),
                "copies": (f"{target.work}{_of(target.subject)}: extra copies", "{:.2f}"),
                "served": (f"{target.work}: bytes served, in needed ones", "{:.2f}"),
                "scale": (f"{target.work}: time, in 50 times that of 20,000", "{:.2f}"),
            }[target.kind]
            bound = "at most" if target.at_most else "at least"
            yield what, f"{bound} {form.format(target.value)}", form.format(value), "yes" if met else "no"


def _of(subject: str) -> str:
    return "" if subject == works.OURS else f" ({subject})"


def _measured(target: Target, work: dict | None, scale: dict[str, float]) -> float | None:
    if target.kind == "scale":
        return scale.get(target.work)
    if target.kind in ("copies", "served"):
        return (copies if target.kind == "copies" else served)(work, target.subject)
    other = {
        "times": works.REFERENCE,
        "each": works.EACH,
        "rival": best(work, is_rival),
        "raw": best(work, is_raw),
    }[target.kind]
    return relative(work, other, works.OURS) if other else None


def text_targets(results: dict) -> str:
    """Returns the targets for a terminal."""
    lines = [f"\n{'targets':<92}{'target':>16}{'measured':>10}  met"]
    lines += [f"{what:<92}{target:>16}{value:>10}  {met}" for what, target, value, met in judged(results)]
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
        mine = [work for work in results["works"] if work["data"] == name]
        columns = _columns(mine)
        for work in mine:
            measured = [row for row in work["rows"] if row["seconds"]]
            for index, row in enumerate(measured):
                rows.append((work["title"] if index == 0 else "", row["subject"], *_cells(work, row, columns)))
        if rows:
            lines += [f"### {data.title[0].upper()}{data.title[1:]}: {data.nbytes() / 1e6:,.0f} MB", ""]
            lines += [*_markdown_rows(("work", "subject", *columns), rows, 2), ""]
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
