"""What the sdist has: every file of the project, and nothing that was built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of the repository alone, and those that setuptools makes.
LEFT_OUT = {".gitignore", ".ci/run"}
ADDED = {"PKG-INFO", "setup.cfg"}


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no repository to compare with")
def test_the_sdist_has_every_file_of_the_repository(tmp_path: Path) -> None:
    command = ("setup.py", "-q", "egg_info", f"--egg-base={tmp_path}", "sdist", f"--dist-dir={tmp_path}")
    environment = {**os.environ, "SAFETENSORS_TORCH_AOT": "0"}
    made = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("safetensors_torch-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()} - LEFT_OUT
    assert expected - names == set(), "MANIFEST.in lacks these"
    # Files that are new are in it, and not in the repository yet.
    built = {name for name in names - expected - ADDED if is_ignored(name)}
    assert built == set(), "MANIFEST.in takes these, which were built"


def is_ignored(name: str) -> bool:
    return subprocess.run(["git", "check-ignore", "--quiet", name], cwd=ROOT).returncode == 0
