"""Checks with other tools: NVIDIA's compute-sanitizer, if it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from checking import Setting, Skip, Wrong, check

_SECONDS = 500.0
_STATUS = 86  # exit status of the sanitizer if it found an error


def _sanitizer() -> str | None:
    """Returns the path of compute-sanitizer, from PATH or the directories of CUDA."""
    directories = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/opt/cuda"]
    roots = [Path(directory) for directory in directories if directory]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    # In the wheels of CUDA, beside torch.
    roots += sorted((Path(torch.__file__).parent.parent / "nvidia").glob("*"))
    for root in roots:
        for place in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if os.access(root / place, os.X_OK):
                return str(root / place)
    return shutil.which("compute-sanitizer")


def _run(setting: Setting, tool: str) -> None:
    program = _sanitizer()
    if setting.device.simulated:
        raise Skip("it is for CUDA alone")
    if program is None:
        raise Skip("compute-sanitizer is not installed")
    script = Path(__file__).resolve().with_name("sanitized.py")
    command = [program, "--tool", tool, "--error-exitcode", str(_STATUS)]
    command += [sys.executable, str(script), str(setting.device.torch), str(setting.directory)]
    # Torch's caching allocator would hide a use after free.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Wrong(f"no end after {_SECONDS:.0f} seconds") from None
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise Wrong(f"status {done.returncode}: {' / '.join(lines[-12:])}")


@check("compute-sanitizer finds no wrong access to memory")
def memcheck(setting: Setting) -> None:
    _run(setting, "memcheck")


@check("compute-sanitizer finds no race")
def racecheck(setting: Setting) -> None:
    _run(setting, "racecheck")
