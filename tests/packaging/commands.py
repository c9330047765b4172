"""Runs commands for the programs of this directory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, environment: dict[str, str] | None = None, directory: Path = ROOT) -> str:
    """Returns the command's standard output. If it fails, ends the program with its output."""
    result = subprocess.run(
        [str(part) for part in command], env=environment, cwd=directory, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        words = " ".join(map(str, command))
        raise SystemExit(f"{words} failed with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result.stdout


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints what was checked and how long it took, if no exception ended it."""
    began = time.monotonic()
    yield
    print(f"ok: {what} ({time.monotonic() - began:.0f} s)", flush=True)
