"""examples/cpp/aoti, and tests/cpp/aoti.cpp with packages that are compiled here.

Run: AOTI=BUILD/aoti AOTI_TESTS=BUILD/aoti_tests python -m pytest tests/examples/test_aoti.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from safetensors_torch import load_file, save_file

AOTI, AOTI_TESTS = os.environ["AOTI"], os.environ["AOTI_TESTS"]
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/cpp/aoti"
# Torch says so when constants are prepared that need no preparation (until 2.13).
WARNING = "[WARNING] Calling constant_folding in model"


class Whole(nn.Module):
    """Parameters with strides, a buffer that is not persistent, a tensor of the program, and what can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 4).t())
        self.bn = nn.BatchNorm1d(3)
        self.register_buffer("freq", torch.arange(3) * 10.0, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x @ (self.matrix * 2)) + self.freq + torch.tensor([1.0, 2.0, 3.0])


class Bare(nn.Module):
    """Tied parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 3), nn.Linear(3, 4, bias=False)
        self.down.weight = self.up.weight
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) @ self.down.weight + self.offset


class Strided(nn.Module):
    """A parameter with strides, in a package without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 4).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.unsqueeze(-1) * self.matrix).sum(1)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packages")
    for name, module in ("whole", Whole()), ("bare", Bare()), ("strided", Strided()):
        is_whole = name == "whole"
        program = torch.export.export(module.eval().requires_grad_(False), (torch.zeros(2, 4),))
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(directory / f"{name}.pt2"),
            inductor_configs={
                "aot_inductor.package_constants_in_so": is_whole,
                "aot_inductor.use_runtime_constant_folding": is_whole,
                "aot_inductor.compile_wrapper_opt_level": "O0",
                "always_keep_tensor_constants": True,
            },
        )
    return directory


def test_the_header(packages: Path) -> None:
    environment = {**os.environ, "AOTI_PACKAGES": str(packages)}
    result = subprocess.run([AOTI_TESTS], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("aoti")
    # Half of the compiler's time.
    environment = {**os.environ, "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0"}
    subprocess.run([sys.executable, EXAMPLE / "make_package.py", directory], env=environment, check=True)
    return directory


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A copy, which a test can change."""
    return Path(shutil.copytree(made, tmp_path / "aoti"))


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([AOTI, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def failure(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    return result.stderr


def change_first(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = directory / "first.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return path


def test_answers_are_those_of_python(directory: Path) -> None:
    for arguments in [directory], [directory, "cpu"]:
        result = run(*arguments)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert lines[:2] == ["first: equal to Python", "second: equal to Python"]
        assert lines[2].startswith("served ")
        assert all(line.startswith(WARNING) for line in result.stderr.splitlines()), result.stderr


def test_answers_of_other_weights_are_told(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["ln_f.bias"] += 1

    change_first(directory, change)
    assert "first: the logits differ from Python's" in failure(directory)


def test_another_dtype_is_an_error(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["wpe.weight"] = tensors["wpe.weight"].half()

    path = change_first(directory, change)
    error = failure(directory)
    assert error.startswith(f"aoti: {path}: 1 tensor(s) do not fit the package")
    assert '"wpe.weight": Half [16, 32] on cpu; compiled for Float [16, 32] on cpu' in error


def test_another_shape_is_an_error(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["h.1.up.weight"] = tensors["h.1.up.weight"].t().contiguous()

    change_first(directory, change)
    assert '"h.1.up.weight": Float [32, 128] on cpu; compiled for Float [128, 32] on cpu' in failure(directory)


def test_a_missing_name_is_an_error(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["ln.bias"] = tensors.pop("ln_f.bias")

    path = change_first(directory, change)
    error = failure(directory)
    assert error.startswith(f"aoti: Error(s) in loading {path} for AOTIModelPackageLoader:")
    assert 'Missing key(s) in state_dict: "ln_f.bias"\n' in error
    assert 'Unexpected key(s) in state_dict: "ln.bias"\n' in error


def test_another_device_is_an_error(directory: Path) -> None:
    error = failure(directory, "meta")
    assert '"wpe.weight": Float [16, 32] on meta; compiled for Float [16, 32] on cpu' in error


def test_the_second_weights_are_checked_while_the_first_serve(directory: Path) -> None:
    shard = next((directory / "second").glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run(directory)
    assert (result.returncode, result.stdout) == (1, "first: equal to Python\n")
    assert str(shard) in result.stderr


def test_wrong_arguments_give_the_usage() -> None:
    result = run()
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage" in result.stderr


def test_the_guide_shows_lines_of_the_example() -> None:
    guide = (ROOT / "docs/cpp.md").read_text()
    section = guide[guide.index("## Compiled models") : guide.index("## Leave TorchScript")]
    shown = [
        line.strip()
        for block in re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    written = {line.strip() for path in EXAMPLE.iterdir() for line in path.read_text().splitlines()}
    assert len(shown) > 10
    assert [line for line in shown if line not in written] == []
