"""The parent's side of a worker: starts it, requests runs one at a time, samples its memory, ends it.

Owns the line protocol and the process. worker.py and raw.c run the work.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from types import TracebackType

import machine

LIMIT_SECONDS = 600.0
_SAMPLE_SECONDS = 0.002


class WorkerError(Exception):
    """A worker that failed. The text names the work, the subject and the failure."""


class WorkerMissing(Exception):
    """A worker whose library is not installed or lacks the function. The text says which."""


class Worker:
    """A process that runs one work of one subject, once for each line it reads."""

    def __init__(self, what: str, command: list[str]) -> None:
        self._what = what
        self._pending = b""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def ready(self) -> str:
        """Waits until the worker is set up. Returns the version of the library it imported."""
        return self._answer()["ready"]

    def run(self, request: str = "run") -> tuple[float, float | None]:
        """Requests one run. Returns its time, and that until its first tensor if it returns them one by one."""
        self._send(request)
        answer = self._answer()
        return answer["seconds"], answer.get("first")

    def memory(self) -> tuple[int, int]:
        """Requests one run that keeps its result. Returns the peak growth of its anonymous and resident memory."""
        pid = self._process.pid
        self._send("hold")
        self._answer()
        before = highest = machine.anonymous_bytes(pid)
        resident = machine.reset_peak(pid)
        self._send("go")
        while not self._has_answer(_SAMPLE_SECONDS):
            highest = max(highest, machine.anonymous_bytes(pid))
        self._answer()
        highest = max(highest, machine.anonymous_bytes(pid))
        risen = machine.peak(pid) - resident
        self._send("end")
        self._answer()
        return highest - before, max(risen, 0)

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise self._ended() from None

    def _has_answer(self, seconds: float) -> bool:
        return bool(self._pending or select.select([self._process.stdout], [], [], seconds)[0])

    def _answer(self) -> dict:
        deadline = time.monotonic() + LIMIT_SECONDS
        while b"\n" not in self._pending:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerError(f"{self._what}: no answer for {LIMIT_SECONDS:.0f} seconds")
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                raise self._ended()
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        answer = json.loads(line)
        if "missing" in answer:
            raise WorkerMissing(answer["missing"])
        if "error" in answer:
            raise WorkerError(f"{self._what}: {answer['error'].strip()}")
        return answer

    def _ended(self) -> WorkerError:
        return WorkerError(f"{self._what}: its process ended with status {self._process.wait()}")
