"""Measures one work: its subjects take turns, each in its own process.

Owns the order of the runs, and the work between them. works.py has the table of works, worker.py and raw.c run them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import machine
import works
from data import DATA_SETS
from places import Place
from process import Worker, WorkerError, WorkerMissing
from works import Subject, Work

# Memory that a run may need besides its data: for each tensor, and for everything else.
_TENSOR, _SPARE = 2 << 10, 64 << 20


# Linux reports free pages to a hypervisor two seconds after they were freed (PAGE_REPORTING_DELAY in
# mm/page_reporting.c), and the hypervisor reclaims them. So nothing is left to reclaim after this time.
_SETTLE_SECONDS = 3.0

# A run of fewer bytes is too short to be disturbed by these reports.
_LARGE_BYTES = 1 << 30


@dataclass(frozen=True)
class Setting:
    """What all works of a run share."""

    directory: Path  # holds the saved files
    place: Place  # holds the data set
    raw: Path  # the program compiled from raw.c
    prerelease: Path  # goes first on sys.path for the pre-release
    rounds: int
    quick: bool  # measures memory only for works with a memory target


class Measurement:
    """The runs of one work."""

    def __init__(self, work: Work, subjects: list[Subject], setting: Setting) -> None:
        self._work = work
        self._setting = setting
        shapes = DATA_SETS[work.data].shapes()
        self._nbytes = DATA_SETS[work.data].nbytes()
        if work.call == "halves":
            self._nbytes = DATA_SETS[work.data].half_bytes()
        copies = 2 if work.call in ("save", "save_file") else 0 if work.options.get("backend") == "mmap" else 1
        # Data read from the disk fills the page cache too.
        copies += work.cold
        self._needed = copies * self._nbytes + len(shapes) * _TENSOR + _SPARE
        self._subjects = list(subjects)
        self._seconds: dict[str, list[float]] = {subject.title: [] for subject in subjects}
        self._first: dict[str, list[float]] = {subject.title: [] for subject in subjects}
        self._served: dict[str, int] = {}
        self._memory: dict[str, tuple[int, int]] = {}
        self.failures: list[str] = []
        self.notes: list[str] = []

    def run(self) -> dict:
        """Measures time, then memory. Subjects that failed are in `failures` and have no row in the result."""
        self._heat()
        if self._work.as_found:
            self._time_fresh()
        else:
            self._time()
        for subject in list(self._subjects):
            wanted = (
                not self._work.as_found
                and not self._setting.quick
                or (subject.title == works.OURS and self._has_memory_target())
            )
            if subject.library != "raw" and wanted:
                self._measure_memory(subject)
        for subject in self._work.subjects:
            shutil.rmtree(self._target(subject).parent, ignore_errors=True)
        rows = [
            {
                "subject": subject.title,
                "seconds": self._seconds[subject.title],
                "first_seconds": self._first[subject.title],
                "served_bytes": self._served.get(subject.title),
                "extra_bytes": self._memory.get(subject.title, (None, None))[0],
                "extra_resident_bytes": self._memory.get(subject.title, (None, None))[1],
            }
            for subject in self._subjects
        ]
        return {
            "name": self._work.name,
            "title": self._work.title,
            "data": self._work.data,
            "bytes": self._nbytes,
            "moves": self._work.moves,
            "rows": rows,
        }

    def _has_memory_target(self) -> bool:
        return any(target.kind == "copies" and target.work == self._work.name for target in works.TARGETS)

    def _rounds(self) -> int:
        return min(self._setting.rounds, DATA_SETS[self._work.data].most_rounds)

    def _source(self, subject: Subject) -> Path:
        reads_pickle = subject.library == "torch" and self._work.reads_file
        return self._neutral().with_suffix(".pt") if reads_pickle else self._neutral()

    def _neutral(self) -> Path:
        return self._setting.place.sources / f"{self._work.data}.safetensors"

    def _target(self, subject: Subject) -> Path:
        number = self._work.subjects.index(subject)
        return self._setting.directory / f"target-{number}" / f"{self._work.data}{self._source(subject).suffix}"

    def _heat(self) -> None:
        """Puts the source files into the page cache, unless each run drops it."""
        if self._work.reads_file and not self._work.cold:
            for path in sorted({self._source(subject) for subject in self._subjects}):
                machine.rewarm(path)

    def _time(self) -> None:
        with contextlib.ExitStack() as stack:
            workers = {subject.title: stack.enter_context(self._start(subject)) for subject in self._subjects}
            for subject in list(self._subjects):
                with self._guard(subject):
                    workers[subject.title].ready()
            for number in range(self._rounds() + 1):
                turn = number % max(len(self._subjects), 1)
                for subject in self._subjects[turn:] + self._subjects[:turn]:
                    with self._guard(subject):
                        self._prepare(subject)
                        self._run(workers[subject.title], subject, is_warm_up=number == 0)

    def _time_fresh(self) -> None:
        """Like `_time`, but each run has its own process, and nothing touches memory before."""
        for number in range(self._rounds() + 1):
            turn = number % max(len(self._subjects), 1)
            for subject in self._subjects[turn:] + self._subjects[:turn]:
                with self._guard(subject), self._start(subject) as worker:
                    worker.ready()
                    self._prepare(subject)
                    self._run(worker, subject, is_warm_up=number == 0)

    def _run(self, worker: Worker, subject: Subject, is_warm_up: bool) -> None:
        if is_warm_up:
            worker.run("check")
            return
        before = self._setting.place.served_bytes()
        seconds, first = worker.run()
        self._seconds[subject.title].append(seconds)
        if first is not None:
            self._first[subject.title].append(first)
        if before is not None:
            self._served[subject.title] = self._setting.place.served_bytes() - before

    def _measure_memory(self, subject: Subject) -> None:
        with self._guard(subject), self._start(subject) as worker:
            worker.ready()
            self._prepare(subject)
            self._memory[subject.title] = worker.memory()

    @contextlib.contextmanager
    def _guard(self, subject: Subject):
        """Records why a subject cannot run, and drops it."""
        try:
            yield
        except WorkerMissing as missing:
            self.notes.append(f"{self._work.name}: without {subject.title}: {missing}")
            self._subjects.remove(subject)
        except WorkerError as error:
            print(f"\nFAILED: {error}\n", file=sys.stderr, flush=True)
            self.failures.append(str(error))
            self._subjects.remove(subject)

    def _prepare(self, subject: Subject) -> None:
        """Brings files and page cache into the same state before each run."""
        if self._work.call == "save_file":
            target = self._target(subject)
            if self._work.fresh:
                target.unlink(missing_ok=True)
            elif not target.exists():
                shutil.copyfile(self._neutral(), target)
            os.sync()  # writeback of earlier runs must not happen during this one
        if self._work.call == "save_sharded":
            shutil.rmtree(self._target(subject), ignore_errors=True)
            os.sync()
        if self._work.cold:
            machine.drop_caches()
        if self._work.as_found or self._nbytes >= _LARGE_BYTES:
            time.sleep(_SETTLE_SECONDS)
        if not self._work.as_found:
            machine.back_memory(self._needed)

    def _start(self, subject: Subject) -> Worker:
        what = f"{self._work.name} / {subject.title}"
        target = self._target(subject)
        target.parent.mkdir(exist_ok=True)
        if subject.library == "raw":
            command = [str(self._setting.raw), subject.loop or self._work.loop, str(self._source(subject)), str(target)]
            return Worker(what, command + (["sync"] if self._work.durable else []))
        prerelease = subject.library == "prerelease"
        # Others have no backends: their options are those of the subject.
        shares_options = subject.library in ("ours", "reference", "prerelease")
        options = {**self._work.options, **subject.options} if shares_options else subject.options
        plan = {
            "library": subject.library,
            "path": str(self._setting.prerelease) if prerelease else "",
            "version": works.VERSIONS.get(subject.library, ""),
            "data": self._work.data,
            "call": self._work.call,
            "options": options,
            "mutable": subject.mutable,
            "touch": self._work.touch,
            "cold": self._work.cold,
            "durable": self._work.durable,
            "source": str(self._source(subject)),
            "neutral": str(self._neutral()),
            "target": str(target),
        }
        return Worker(what, [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(plan)])
