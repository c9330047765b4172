"""Targets that cannot be renamed over: mount points, as in containers, and pipes."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import safetensors_torch

SAVE = """
import sys, torch, safetensors_torch
try:
    safetensors_torch.save_file({"a": torch.arange(5), "b": eval(sys.argv[2])}, sys.argv[1])
except RuntimeError as error:
    print("refused:", error)
"""


def in_mount(target: Path, tensor: str) -> subprocess.CompletedProcess[str]:
    """Saves to `target` in a process where another file is mounted over it."""
    backing = target.with_name("backing")
    mount_then_run = 'mount --bind "$1" "$2"; shift 2; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount_then_run, "sh", str(backing), str(target)]
    command += [sys.executable, "-c", SAVE, str(target), tensor]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "--bind", str(tmp_path), str(tmp_path)], capture_output=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip("this process may not mount")
    target = tmp_path / "mounted.safetensors"
    target.write_bytes(b"shown outside of the mount")
    (tmp_path / "backing").write_bytes(b"old and longer than what is written over it " * 50)
    return target


def test_the_file_is_overwritten_in_place(target: Path) -> None:
    done = in_mount(target, "torch.ones(2)")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    loaded = safetensors_torch.load_file(target.with_name("backing"))
    assert torch.equal(loaded["a"], torch.arange(5)) and torch.equal(loaded["b"], torch.ones(2))
    assert sorted(path.name for path in target.parent.iterdir()) == ["backing", "mounted.safetensors"]
    assert target.read_bytes() == b"shown outside of the mount"


def test_a_refused_save_leaves_it_alone(target: Path) -> None:
    backing = target.with_name("backing")
    before = backing.read_bytes()
    done = in_mount(target, "torch.ones(2, device='meta')")
    assert done.stdout.startswith("refused: Cannot copy out of meta tensor"), done.stderr
    assert backing.read_bytes() == before


FILL = """
import sys, torch, safetensors_torch
before = open(sys.argv[1], "rb").read()
try:
    safetensors_torch.save_file({"a": torch.zeros(80_000, dtype=torch.uint8)}, sys.argv[1])
except OSError as error:
    print(error.errno, open(sys.argv[1], "rb").read() == before)
"""


def test_a_mount_without_room_keeps_the_old_file(target: Path) -> None:
    """The new file fits into its staging directory, but not on the filesystem mounted over the target."""
    small = target.with_name("small")
    small.mkdir()
    prepare = (
        'mount -t tmpfs -o size=64k tmpfs "$1" && head -c 20000 /dev/urandom >"$1/old" && mount --bind "$1/old" "$2"; '
        'shift 2; exec "$@"'
    )
    command = ["unshare", "--mount", "sh", "-c", prepare, "sh", str(small), str(target), sys.executable, "-c", FILL]
    done = subprocess.run([*command, str(target)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(errno.ENOSPC), "True"], done.stderr
    assert sorted(path.name for path in target.parent.iterdir()) == ["backing", "mounted.safetensors", "small"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    script = 'import sys, torch, safetensors_torch; safetensors_torch.save_file({"a": torch.arange(9)}, sys.argv[1])'
    for name in ("/dev/stdout", "/dev/fd/1"):
        done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, check=False, cwd=tmp_path)
        assert done.stdout == safetensors_torch.save({"a": torch.arange(9)}), done.stderr
    assert not list(tmp_path.iterdir())
