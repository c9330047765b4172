"""torch.ops.safetensors_torch and its TorchBind class inside TorchScript."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch

import safetensors_torch  # noqa: F401 - registers the ops
from random_state import difference
from support import as_bytes, as_tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.tensor([True, False]), "step": torch.tensor(7)}


@pytest.fixture
def path(tmp_path: Path, state: dict[str, torch.Tensor]) -> str:
    reference.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    return str(tmp_path / "model.safetensors")


@torch.jit.script
def scripted_loads(
    path: str, data: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    cpu = torch.device("cpu")
    by_name = torch.ops.safetensors_torch.load_file(path, device=cpu, backend="pread")
    from_bytes = torch.ops.safetensors_torch.load(data)
    return by_name, from_bytes, torch.ops.safetensors_torch.get_tensor(path, "weight", device=cpu)


@torch.jit.script
def scripted_saves(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str] | None) -> torch.Tensor:
    torch.ops.safetensors_torch.save_file(tensors, path, metadata)
    return torch.ops.safetensors_torch.save(tensors, metadata)


@torch.jit.script
def scripted_file(path: str, backend: str) -> tuple[list[str], list[int], str, torch.Tensor, torch.Tensor, int]:
    file = torch.classes.safetensors_torch.File(path, backend)
    cpu = torch.device("cpu")
    part = file.get_slice("weight", [1, 0], [3, 4], [1, 3], cpu)
    whole = file.get_tensor("weight", cpu)
    result = (file.offset_keys(), file.tensor_shape("weight"), file.dtype("weight"), whole, part, file.size())
    file.close()
    return result


@torch.jit.script
def scripted_turns(x: torch.Tensor, path: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.ops.safetensors_torch.save_file({"x": x}, path)
    first = torch.ops.safetensors_torch.get_tensor(path, "x")
    torch.ops.safetensors_torch.save_file({"x": x + 1}, path)
    second = torch.ops.safetensors_torch.get_tensor(path, "x")
    torch.ops.safetensors_torch.save_file({"x": x + 2}, path)
    return first, second, torch.ops.safetensors_torch.load_file(path)["x"]


class Frozen(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        read = torch.ops.safetensors_torch.get_tensor(self.path, "weight")
        return read, torch.ops.safetensors_torch.load_file(self.path)["weight"]


def test_scripted_loads(path: str, state: dict[str, torch.Tensor]) -> None:
    by_name, from_bytes, weight = scripted_loads(path, as_tensor(Path(path).read_bytes()))
    assert difference(by_name, state) is None
    assert difference(from_bytes, state) is None
    assert torch.equal(weight, state["weight"])


def test_scripted_saves(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        data = scripted_saves(state, str(tmp_path / "scripted"), metadata)
        assert as_bytes(data) == (tmp_path / "scripted").read_bytes() == reference.save(state, metadata)


def test_reads_and_writes_of_a_script_keep_their_order(tmp_path: Path) -> None:
    for _ in range(3):  # optimised from the second call on
        results = scripted_turns(torch.zeros(2), str(tmp_path / "turns"))
        assert [float(tensor[0]) for tensor in results] == [0, 1, 2]


def test_freezing_keeps_the_reads(path: str) -> None:
    frozen = torch.jit.freeze(torch.jit.script(Frozen(path).eval()))
    reference.save_file({"weight": torch.full((2,), 5.0)}, path)
    for _ in range(3):
        assert [tensor.tolist() for tensor in frozen()] == [[5.0, 5.0], [5.0, 5.0]]


def test_a_script_that_was_saved_still_finds_the_ops(path: str, tmp_path: Path) -> None:
    scripted_loads.save(str(tmp_path / "loads.pt"))
    again = torch.jit.load(str(tmp_path / "loads.pt"))
    assert torch.equal(again(path, as_tensor(Path(path).read_bytes()))[2], torch.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_scripted_file(backend: str, path: str, state: dict[str, torch.Tensor]) -> None:
    keys, shape, dtype, whole, part, size = scripted_file(path, backend)
    assert (keys, shape, dtype, size) == (["step", "weight", "bias"], [3, 4], "F32", 3)
    assert torch.equal(whole, state["weight"])
    assert torch.equal(part, state["weight"][1:3, ::3])


def test_messages_in_a_script_carry_no_backtrace(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"No such file or directory: {tmp_path}/absent")) as refusal:
        scripted_file(str(tmp_path / "absent"), "mmap")
    for leak in ("frame #", "Exception raised from"):
        assert leak not in str(refusal.value)
