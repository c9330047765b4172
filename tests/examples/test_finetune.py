"""examples/cpp/finetune: C++ and Python train one module by turns.

Run: FINETUNE=BUILD/finetune python -m pytest tests/examples/test_finetune.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safetensors_torch import load_file, safe_open, save_file

CPP = [os.environ["FINETUNE"]]
PYTHON = [sys.executable, str(Path(__file__).resolve().parents[2] / "examples/cpp/finetune/finetune.py")]


def run(program: list[str], directory: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*program, str(directory)], capture_output=True, text=True, check=False)


def train(program: list[str], directory: Path) -> tuple[float, float]:
    """The loss before and after a turn."""
    result = run(program, directory)
    assert (result.returncode, result.stderr) == (0, "")
    before, after = re.search(r"loss ([0-9.]+) -> ([0-9.]+)$", result.stdout.strip()).groups()
    return float(before), float(after)


def test_each_turn_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    losses = [train(program, directory) for program in (CPP, PYTHON, CPP, PYTHON)]
    assert all(after < before for before, after in losses), losses
    assert [before for before, _ in losses[1:]] == [after for _, after in losses[:-1]]
    assert losses[-1][1] < losses[0][0] / 2


@pytest.mark.parametrize("program", [CPP, PYTHON], ids=["C++", "Python"])
def test_another_loss_than_recorded_is_an_error(tmp_path: Path, program: list[str]) -> None:
    train(CPP, tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path) as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["output.bias"] += 0.001
    save_file(tensors, path, metadata=metadata)
    result = run(program, tmp_path)
    assert result.returncode == 1
    assert f"{path}: its loss was " in result.stderr
