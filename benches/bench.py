"""Times this library, the reference `safetensors`, torch's own files, and the raw limit of the machine.

Run: make bench    or    .venv/bin/python benches/bench.py [options]

Owns the command line, the setup and the order of the works. Each subject of a work has its own process. The subjects
take turns in a rotating order, and wait while another runs. Between two runs the process returns freed memory to the
system, files are restored, and all writes reach the disk.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import machine
import places
import report
import works
from data import DATA_SETS
from measure import Measurement, Setting
from works import WORKS, Subject, Work

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench"
ROUNDS, QUICK_ROUNDS = 5, 2
QUICK_SUBJECTS = (works.OURS, works.REFERENCE, works.RAW)
QUICK_DATA = ("small", "gpt2")


def is_quick(work: Work) -> bool:
    """Returns whether --quick measures a work."""
    return work.data in QUICK_DATA and not work.cold and not work.durable and not work.as_found


class Run:
    """One run of the benchmark: its works, their subjects and the results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._notes: list[str] = []
        self._failures: list[str] = []
        self._results: list[dict] = []
        self._plan = self._choose()

    def _choose(self) -> list[tuple[Work, list[Subject]]]:
        quick, only, subjects = self._arguments.quick, self._arguments.only, self._arguments.subjects
        plan = []
        for work in WORKS:
            chosen = [
                subject
                for subject in work.subjects
                if re.search(subjects, subject.title) and not (quick and subject.title not in QUICK_SUBJECTS)
            ]
            if re.search(only, work.name) and chosen and not (quick and not is_quick(work)):
                plan.append((work, chosen))
        if not plan:
            sys.exit(f"bench: no work matches; there are:\n  {chr(10).join(work.name for work in WORKS)}")
        if quick:
            left_out = [name for name in DATA_SETS if name not in QUICK_DATA]
            self._note(
                f"--quick: without the data sets {' and '.join(left_out)}, cold, durable and fresh works, torch's own"
                " functions, other rivals and prefault; memory only of ours where there is a target for it"
            )
        return plan

    def _note(self, text: str) -> None:
        print(f"note: {text}", flush=True)
        self._notes.append(text)

    def _has(self, library: str) -> bool:
        return any(subject.library == library for _, subjects in self._plan for subject in subjects)

    def _drop(self, library: str) -> None:
        left = [(work, [one for one in subjects if one.library != library]) for work, subjects in self._plan]
        self._plan = [(work, subjects) for work, subjects in left if subjects]

    def _install_prerelease(self, directory: Path) -> None:
        """Installs the pre-release into `directory`, or excludes it if it cannot be downloaded."""
        version = works.VERSIONS["prerelease"]
        if not self._has("prerelease") or list(directory.glob(f"safetensors-{version}.dist-info")):
            return
        shutil.rmtree(directory, ignore_errors=True)
        wanted = f"safetensors=={version}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*command, "--pre", "--target", str(directory), wanted]).returncode != 0:
            self._note(f"{wanted} cannot be installed: left out")
            self._drop("prerelease")

    def _compile_raw(self, program: Path) -> None:
        if self._has("raw"):
            source = Path(__file__).with_name("raw.c")
            subprocess.run(["cc", "-O2", "-pthread", str(source), "-o", str(program)], check=True)

    def measure(self) -> dict:
        """Measures the chosen works and returns the content of the JSON file."""
        OUT.mkdir(parents=True, exist_ok=True)
        prerelease, raw = OUT / "safetensors-pre", OUT / "raw"
        self._install_prerelease(prerelease)
        self._compile_raw(raw)
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self._arguments.directory) as name:
            directory = Path(name)
            for data in DATA_SETS:
                mine = [entry for entry in self._plan if entry[0].data == data]
                if not mine:
                    continue
                try:
                    with places.at(DATA_SETS[data].place, directory, DATA_SETS[data].nbytes()) as place:
                        if self._make(data, place):
                            rounds, quick = self._arguments.rounds, self._arguments.quick
                            self._measure_set(mine, Setting(directory, place, raw, prerelease, rounds, quick))
                            for path in place.files.glob(f"{data}.*"):
                                path.unlink()
                except places.Unavailable as missing:
                    self._note(f"{data} left out: {missing}")
            described = machine.describe(directory)
        return {
            "date": datetime.date.today().isoformat(),
            "command": shown_command(),
            "machine": described | {"torch": version("torch"), "safetensors-torch": version("safetensors-torch")},
            "rounds": self._arguments.rounds,
            "notes": self._notes + [text for library, text in works.LIMITS.items() if self._has(library)],
            "failures": self._failures,
            "works": self._results,
        }

    def _make(self, name: str, place: places.Place) -> bool:
        """Writes the files of a data set. Returns False if memory or disk are too small."""
        nbytes = DATA_SETS[name].nbytes()
        is_on_disk = DATA_SETS[name].place == "disk"  # other places check for themselves
        if is_on_disk and (machine.available_memory() < 3 * nbytes or machine.free_disk(place.files) < 6 * nbytes):
            self._note(f"{name} left out: it takes {3 * nbytes / 1e9:.0f} GB of memory, {6 * nbytes / 1e9:.0f} of disk")
            return False
        print(f"\n{DATA_SETS[name].title}, {nbytes / 1e6:,.0f} MB", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name("data.py")), name, str(place.files)], check=True)
        return True

    def _measure_set(self, plan: list[tuple[Work, list[Subject]]], setting: Setting) -> None:
        for work, subjects in plan:
            if work.cold and not machine.can_drop_caches():
                self._note(f"{work.name} left out: only root can drop the page cache")
                continue
            measurement = Measurement(work, subjects, setting)
            result = measurement.run()
            self._failures += measurement.failures
            for note in measurement.notes:
                self._note(note)
            self._results.append(result)
            print(report.text_table([result]), flush=True)


def shown_command() -> str:
    """Returns the command without the options that name paths of this machine."""
    hidden = ("--directory", "--json", "--docs")
    words = []
    skip = False
    for word in sys.argv[1:]:
        if not skip and not word.startswith(hidden):
            words.append(word)
        skip = word in hidden
    return " ".join(["python benches/bench.py", *words])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the most telling part, in under two minutes")
    parser.add_argument(
        "--rounds", type=int, help=f"timed runs of each, {ROUNDS} unless given; fewer where each takes seconds"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="the works whose name matches")
    parser.add_argument("--subjects", default="", metavar="REGEX", help="the subjects whose name matches")
    parser.add_argument("--directory", type=Path, help="where the files go; a temporary directory otherwise")
    parser.add_argument("--json", type=Path, default=OUT / "results.json", metavar="FILE", help="where results go")
    parser.add_argument("--docs", type=Path, metavar="FILE.md", help="put the tables into this file, a plot beside it")
    parser.add_argument("--reuse", action="store_true", help="measure nothing: take the results in the --json file")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return arguments


def main() -> None:
    arguments = parse()
    # SIGTERM must run the cleanup too: the files are large.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    if arguments.reuse:
        results = json.loads(arguments.json.read_text())
        print(report.text_table(results["works"]))
    else:
        results = Run(arguments).measure()
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(report.text_targets(results))
    if not arguments.reuse:
        print(f"\n{time.monotonic() - started:.0f} seconds; results in {arguments.json}")
    if arguments.docs:
        report.write_docs(results, arguments.docs)
    for failure in results["failures"]:
        print(f"FAILED: {failure.splitlines()[0]} ... {failure.splitlines()[-1]}", file=sys.stderr)
    if results["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
