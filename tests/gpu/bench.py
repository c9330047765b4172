"""The benchmark: every file and every subject, in turns, each run in its own process.

Owns the order, and the result of a subject that fails. The clock is in worker.py.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import machine
import processes
import rivals

# The time limit of a process, besides the time of its bytes at a very low speed.
_SECONDS = 300.0
_SLOWEST = 50e6  # bytes a second
_GB = 10**9

_SMALL = (1_000_000, 10_000_000, 100_000_000)
_TINY = 20_000
# Larger files are not saved: that takes long and shows nothing more.
_MOST_SAVED = 6 * _GB


@dataclass(frozen=True)
class Plan:
    """What to measure, and where."""

    device: str
    device_bytes: int  # free on the device
    directory: Path
    sizes: tuple[float, ...]  # GB
    rounds: int
    prerelease: str  # the directory of a pre-release of the reference, or empty


def contents(sizes: tuple[float, ...]) -> list[tuple[data.Content, bool]]:
    """Returns the files, small ones first, and whether each is large."""
    small = [data.model(f"{nbytes // 1_000_000} MB", nbytes) for nbytes in _SMALL]
    large = [data.model(f"{size:g} GB", round(size * _GB)) for size in sizes]
    return [*((content, False) for content in (data.tiny("5 MB", _TINY), *small)), *((one, True) for one in large)]


class Bench:
    """One run of the benchmark."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._missing: set[str] = set()  # keys of subjects that are not installed
        self._reasons: dict[str, list[str]] = {}  # reason: what was not measured
        self.failures: list[str] = []  # of this library

    @property
    def notes(self) -> list[str]:
        """Lists what was not measured, and why."""
        return [f"{why} ({', '.join(what)})" for why, what in self._reasons.items()]

    def _note(self, what: str, why: str) -> None:
        print(f"  not measured: {what}: {why}", file=sys.stderr, flush=True)
        self._reasons.setdefault(why, []).append(what)

    def run(self) -> dict[str, Any]:
        """Measures everything and returns the figures for the JSON file."""
        found: dict[str, Any] = {"loads": [], "saves": [], "ceilings": {}}
        for content, is_large in contents(self._plan.sizes):
            print(f"\n{content.name}: {content.title}, {content.nbytes() / 1e6:,.1f} MB", file=sys.stderr, flush=True)
            if not self._fits(content):
                continue
            path = self._plan.directory / "model.safetensors"
            try:
                checksum = data.make(content, path)
                machine.flush(path)
                if is_large:
                    found["ceilings"][content.name] = self._ceilings(content, path)
                found["loads"].append(self._measure("load", content, path, checksum))
                if is_large and content.nbytes() <= _MOST_SAVED:
                    found["saves"].append(self._measure("save", content, path, checksum))
            finally:
                path.unlink(missing_ok=True)
        return found

    def _fits(self, content: data.Content) -> bool:
        """Returns whether a file, a saved copy and a copy on the device fit."""
        nbytes = content.nbytes()
        for what, needed, there in (
            ("disk", 2 * nbytes, machine.free_disk(self._plan.directory)),
            ("memory", 2 * nbytes, machine.available_memory()),
            ("memory on the device", nbytes * 5 // 4, self._plan.device_bytes),
        ):
            if there < needed:
                self._note(content.name, f"it needs {needed / _GB:.1f} GB of {what}")
                return False
        return True

    def _ceilings(self, content: data.Content, path: Path) -> dict[str, Any]:
        request = {"device": self._plan.device, "path": str(path)}
        try:
            return processes.ask("ceilings.py", request, _SECONDS * 2 + path.stat().st_size / _SLOWEST)
        except processes.ChildError as error:
            self._note(f"{content.name}, the machine's own limits", _short(error))
            return {}

    def _measure(self, work: str, content: data.Content, path: Path, checksum: int) -> dict[str, Any]:
        everybody = rivals.LOADS if work == "load" else rivals.SAVES
        subjects = [subject for subject in everybody if subject.key not in self._missing]
        rows: dict[str, dict[str, Any]] = {}
        for number in range(self._plan.rounds):
            turn = number % max(1, len(subjects))
            for subject in subjects[turn:] + subjects[:turn]:
                answer = self._ask(work, subject, path, checksum)
                if "why" in answer:
                    subjects.remove(subject)
                    rows.pop(subject.key, None)
                    what = f"{work} of {content.name}"
                    self._note(what, f"{subject.title}: {answer['why']}")
                    if subject.key in rivals.OWN:
                        self.failures.append(f"{what}: {answer['why']}")
                    continue
                row = rows.setdefault(subject.key, {"key": subject.key, "title": subject.title, "runs": []})
                row["version"] = answer.pop("version")
                row["runs"].append(answer)
        for row in rows.values():
            print(f"  {work}: {row['title']:<28} {_shown(row, content.nbytes())}", file=sys.stderr, flush=True)
        order = [subject.key for subject in everybody]
        return {
            "name": content.name,
            "title": content.title,
            "bytes": content.nbytes(),
            "tensors": len(content.shapes),
            "rows": sorted(rows.values(), key=lambda row: order.index(row["key"])),
        }

    def _ask(self, work: str, subject: rivals.Subject, path: Path, checksum: int) -> dict[str, Any]:
        machine.warm(path)
        request = {
            "work": work,
            "subject": subject.key,
            "device": self._plan.device,
            "path": str(path),
            "target": str(path.with_name("saved.safetensors")),
            "checksum": checksum,
            "prerelease": self._plan.prerelease if subject.prerelease else "",
        }
        try:
            answer = processes.ask("worker.py", request, _SECONDS + path.stat().st_size / _SLOWEST)
        except processes.ChildError as error:
            return {"why": _short(error)}
        if "ended" in answer:
            ended = answer.pop("ended").splitlines()[0]
            print(f"  {subject.title}: after its answer, {ended}", file=sys.stderr, flush=True)
        if "missing" in answer:
            self._missing.add(subject.key)
            return {"why": answer["missing"]}
        return answer


def times(row: dict[str, Any]) -> dict[str, float]:
    """Returns the medians of a row in seconds: of the first run in a process, of the second, and of all later ones."""
    runs = row["runs"]
    return {
        "first": statistics.median(run["first"] for run in runs),
        "second": statistics.median(run["second"] for run in runs),
        "later": statistics.median(seconds for run in runs for seconds in run["later"]),
    }


def _short(error: Exception) -> str:
    """Returns the first and the last line of an error."""
    lines = str(error).splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


def _shown(row: dict[str, Any], nbytes: int) -> str:
    found = times(row)
    return f"first {found['first']:.4f} s, later {found['later']:.4f} s, {nbytes / found['later'] / 1e9:.2f} GB/s"
