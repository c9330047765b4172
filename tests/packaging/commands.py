"""Commands that the programs of this directory run."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, environment: dict[str, str] | None = None, directory: Path = ROOT) -> str:
    """The command's standard output; ends the program with all that it said where it fails."""
    result = subprocess.run(
        [str(part) for part in command], env=environment, cwd=directory, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout
