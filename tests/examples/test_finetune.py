"""examples/cpp/finetune: C++ and Python train one module by turns.

Run: FINETUNE=BUILD/finetune python -m pytest tests/examples/test_finetune.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safetensors_torch import load_file, safe_open, save_file

CPP = [os.environ["FINETUNE"]]
PYTHON = [sys.executable, str(Path(__file__).resolve().parents[2] / "examples/cpp/finetune/finetune.py")]
FILES = "model.safetensors", "optimizer.safetensors"


def run(program: list[str], directory: Path, *steps: int) -> subprocess.CompletedProcess:
    return subprocess.run([*program, str(directory), *map(str, steps)], capture_output=True, text=True, check=False)


def train(program: list[str], directory: Path, *steps: int) -> tuple[float, float]:
    """The loss before and after a turn."""
    result = run(program, directory, *steps)
    assert (result.returncode, result.stderr) == (0, "")
    before, after = re.search(r"loss ([0-9.]+) -> ([0-9.]+)$", result.stdout.strip()).groups()
    return float(before), float(after)


def contents(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in FILES]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path) as file:
        return file.metadata()


def test_each_turn_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    losses = [train(program, directory) for program in (CPP, PYTHON, CPP, PYTHON)]
    assert all(after < before for before, after in losses), losses
    assert [before for before, _ in losses[1:]] == [after for _, after in losses[:-1]]
    assert losses[-1][1] < losses[0][0] / 2


@pytest.mark.parametrize("program", [CPP, PYTHON], ids=["C++", "Python"])
def test_a_training_that_stops_and_goes_on_ends_as_one_without_a_stop(tmp_path: Path, program: list[str]) -> None:
    train(CPP, tmp_path / "whole", 20)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    train(program, tmp_path / "whole", 60)
    for steps in 25, 35:
        train(program, tmp_path / "resumed", steps)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert {metadata_of(tmp_path / "whole" / name)["step"] for name in FILES} == {"80"}


def test_each_language_keeps_the_state_of_the_other(tmp_path: Path) -> None:
    train(CPP, tmp_path, 30)
    path = tmp_path / "optimizer.safetensors"
    of_cpp = contents(tmp_path)
    saved = load_file(path)
    assert saved["state.hidden.weight.step"] == 30
    train(PYTHON, tmp_path, 0)
    by_python = load_file(path)
    assert metadata_of(path) == {"optimizer": "AdamW", "step": "30"}
    for name, tensor in saved.items():
        assert by_python[name].dtype == tensor.dtype, name
        assert torch.equal(by_python[name], tensor), name
    assert {name.rpartition(".")[2] for name in by_python.keys() - saved.keys()} == {
        "maximize",
        "capturable",
        "differentiable",
        "decoupled_weight_decay",
    }
    train(CPP, tmp_path, 0)
    assert contents(tmp_path) == of_cpp


def test_turns_of_both_languages_stay_close_to_a_training_in_one(tmp_path: Path) -> None:
    train(CPP, tmp_path / "turns", 20)
    for copy in "whole", "forgetful":
        shutil.copytree(tmp_path / "turns", tmp_path / copy)
    train(PYTHON, tmp_path / "turns", 5)
    train(CPP, tmp_path / "turns", 10)
    train(CPP, tmp_path / "whole", 15)
    path = tmp_path / "forgetful" / "optimizer.safetensors"
    options = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("state.")}
    save_file(options, path, metadata=metadata_of(path))
    train(CPP, tmp_path / "forgetful", 15)

    def distance(directory: str) -> float:
        whole, other = (load_file(tmp_path / name / FILES[0]) for name in ("whole", directory))
        return max((other[name] - whole[name]).abs().max().item() for name in whole)

    # The last digits differ; without the state of the optimizer, the first ones do.
    assert distance("turns") < 1e-5
    assert distance("forgetful") > 1e-2


@pytest.mark.parametrize("program", [CPP, PYTHON], ids=["C++", "Python"])
def test_another_loss_than_recorded_is_an_error(tmp_path: Path, program: list[str]) -> None:
    train(CPP, tmp_path)
    path = tmp_path / "model.safetensors"
    metadata = metadata_of(path)
    tensors = load_file(path)
    tensors["output.bias"] += 0.001
    save_file(tensors, path, metadata=metadata)
    result = run(program, tmp_path)
    assert result.returncode == 1
    assert f"{path}: its loss was " in result.stderr


@pytest.mark.parametrize("program", [CPP, PYTHON], ids=["C++", "Python"])
def test_files_of_two_steps_are_an_error(tmp_path: Path, program: list[str]) -> None:
    train(CPP, tmp_path, 3)
    old = (tmp_path / "model.safetensors").read_bytes()
    train(CPP, tmp_path, 3)
    (tmp_path / "model.safetensors").write_bytes(old)
    result = run(program, tmp_path)
    assert result.returncode == 1
    assert "optimizer.safetensors: it is of another step than " in result.stderr
