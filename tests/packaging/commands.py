"""Runs commands for the programs of this directory."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, environment: dict[str, str] | None = None, directory: Path = ROOT) -> str:
    """Returns the command's standard output. If it fails, ends the program with its output."""
    result = subprocess.run(
        [str(part) for part in command], env=environment, cwd=directory, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout
