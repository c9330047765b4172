"""Runs targets of the Makefile side by side and prints one line for each.

Run: python3 tests/suites.py [--jobs N] TARGET... [--alone TARGET...]

The output of a target goes to out/logs/TARGET.log. The logs of the targets that failed are printed at the end. Targets
after --alone run one at a time when all others have ended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

LOGS = Path("out/logs")


def start(target: str) -> subprocess.Popen[bytes]:
    command = [os.environ.get("MAKE", "make"), "--no-print-directory", target]
    with (LOGS / f"{target}.log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def run(targets: list[str], jobs: int) -> list[str]:
    """Runs the targets, at most ``jobs`` at a time, and returns those that failed."""
    waiting, failed = list(targets), []
    running: dict[int, tuple[str, subprocess.Popen[bytes], float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            target = waiting.pop(0)
            process = start(target)
            running[process.pid] = (target, process, time.monotonic())
        pid, status, usage = os.wait4(-1, 0)
        target, process, begin = running.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            failed.append(target)
        seconds, processor = time.monotonic() - begin, usage.ru_utime + usage.ru_stime
        verdict = "FAILED" if target in failed else "ok"
        print(f"{verdict:<7} {target:<20} {seconds:5.0f} s, {processor:5.0f} s of processor time", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--alone", nargs="+", default=[], metavar="TARGET")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="as many as processors if absent"
    )
    arguments = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    failed = run(arguments.targets, arguments.jobs) + run(arguments.alone, 1)
    for target in failed:
        print(f"\n==== {target} failed:\n", flush=True)
        sys.stdout.buffer.write((LOGS / f"{target}.log").read_bytes())
    count = len(arguments.targets) + len(arguments.alone)
    print(f"{count - len(failed)} passed, {len(failed)} failed, in {time.monotonic() - begin:.0f} s", *failed)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
