"""load_model and save_model of modules on one device or several."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import accelerator
from accelerator import device
from safetensors_torch import load_model, save_model
from support import Tied
from support_accelerator import MIB, SLAB, assert_equal, reserve, values, write


def block(width: int = 700) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 3), nn.Embedding(5, 1))


def on_host(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_parameters_are_filled_where_they_are(tmp_path: Path, mode: str, backend: str) -> None:
    source, model = block(), block().to(device())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    save_model(source, tmp_path / "a")
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    versions = {name: tensor._version for name, tensor in model.state_dict().items()}
    gc.collect()
    accelerator.reset_statistics()
    allocated = accelerator.statistics()["devices"][0]["allocated"]
    assert load_model(model, tmp_path / "a", backend=backend) == (set(), [])
    # No second copy of anything on the device.
    assert accelerator.statistics()["devices"][0]["peak"] == allocated
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == pointers
    assert all(tensor._version > versions[name] for name, tensor in model.state_dict().items() if tensor.numel())
    assert_equal(dict(model.state_dict()), on_host(source))


def test_a_model_on_two_devices_and_the_host(tmp_path: Path, mode: str) -> None:
    source, model = block(), block()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(3)
    save_model(source, tmp_path / "a")
    model[0].to(device(0))
    model[2].to(device(1))
    assert load_model(model, tmp_path / "a") == (set(), [])
    assert [model[i].weight.device for i in (0, 1, 2)] == [device(0), torch.device("cpu"), device(1)]
    for name, tensor in on_host(source).items():
        assert torch.equal(on_host(model)[name], tensor)
    save_model(model, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_other_dtypes_are_converted_on_the_device_slab_by_slab(tmp_path: Path, mode: str, overlaps: bool) -> None:
    source, model = block(1500), block(1500).half().to(device())
    save_model(source, tmp_path / "a")
    gc.collect()
    accelerator.reset_statistics()
    allocated = accelerator.statistics()["devices"][0]["allocated"]
    load_model(model, tmp_path / "a")
    assert accelerator.statistics()["devices"][0]["peak"] <= allocated + SLAB
    assert_equal(dict(model.state_dict()), on_host(source.half()))


def test_parameters_that_are_not_contiguous(tmp_path: Path, mode: str) -> None:
    source = nn.Module()
    source.register_buffer("a", values(1200 * 900).reshape(1200, 900))
    source.register_buffer("b", values(MIB, 1))
    model = nn.Module()
    model.register_buffer("a", torch.zeros(900, 1200, device=device()).t())
    model.register_buffer("b", torch.zeros(2 * MIB, device=device())[::2])
    save_model(source, tmp_path / "a")
    load_model(model, tmp_path / "a")
    assert torch.equal(model.a.cpu(), source.a) and torch.equal(model.b.cpu(), source.b)


def test_views_of_a_larger_memory(tmp_path: Path, mode: str) -> None:
    whole = torch.zeros(3 * MIB, device=device())
    model = nn.Module()
    model.register_buffer("a", whole[7 : 7 + MIB])
    model.register_buffer("b", whole[2 * MIB + 1 : 2 * MIB + 100])
    state = {"a": values(MIB), "b": values(99, 1)}
    load_model(model, write(tmp_path / "a", state))
    expected = torch.zeros(3 * MIB)
    expected[7 : 7 + MIB], expected[2 * MIB + 1 : 2 * MIB + 100] = state["a"], state["b"]
    assert torch.equal(whole.cpu(), expected)


def test_tied_weights(tmp_path: Path, mode: str) -> None:
    source, model = Tied(), Tied().to(device())
    model.embedding.weight = model.head.weight  # moving the module untied them
    save_model(source, tmp_path / "a")
    assert load_model(model, tmp_path / "a") == (set(), [])
    assert model.embedding.weight is model.head.weight
    assert_equal(dict(model.state_dict()), on_host(source))
    save_model(model, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_module_with_hooks(tmp_path: Path, mode: str) -> None:
    source, model = block(), block().to(device())
    model.register_load_state_dict_pre_hook(lambda *arguments: None)
    save_model(source, tmp_path / "a")
    assert load_model(model, tmp_path / "a", device=device()) == (set(), [])
    assert_equal(dict(model.state_dict()), on_host(source))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("register", ["register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"])
def test_hooks_need_no_second_copy_on_the_device(tmp_path: Path, register: str, fails: bool) -> None:
    source, model = block(1500), block(1500).to(device())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    if fails:
        source[3] = nn.Embedding(6, 1)
    save_model(source, tmp_path / "a")
    getattr(model, register)(lambda *arguments: None)
    before = on_host(model)
    gc.collect()
    accelerator.reset_statistics()
    allocated = accelerator.statistics()["devices"][0]["allocated"]
    if fails:
        with pytest.raises(RuntimeError, match="size mismatch"):
            load_model(model, tmp_path / "a")
    else:
        assert load_model(model, tmp_path / "a") == (set(), [])
    # Tensors are copied back one at a time.
    most = 2 * max(tensor.nbytes for tensor in before.values()) if fails else 0
    assert accelerator.statistics()["devices"][0]["peak"] <= allocated + most
    assert_equal(dict(model.state_dict()), before if fails else on_host(source))


def test_a_refused_load_changes_nothing(tmp_path: Path) -> None:
    reserve(4)
    model = block().to(device())
    before = on_host(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_model(model, write(tmp_path / "a", {**before, "2.bias": torch.zeros(4)}))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(model, write(tmp_path / "a", {"0.bias": before["0.bias"] + 1}))
    assert_equal(dict(model.state_dict()), before)
