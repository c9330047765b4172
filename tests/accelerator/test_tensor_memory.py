"""Tensors on a device whose memory is missing, or changes during a load or save."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import accelerator
from accelerator import device
from safetensors_torch import IncrementalWriter, _progress, load_model, save, save_file, save_model, save_sharded
from support import entries
from support_accelerator import MIB, held_pool, reserve, values, write

COUNT = MIB


def resized(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def model_of(tensors: dict[str, torch.Tensor]) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    return model


@pytest.fixture(params=["freed", "shrunk", "an offset"])
def bad(request: pytest.FixtureRequest) -> torch.Tensor:
    """A tensor of forty numbers in a storage that is too small."""
    if request.param == "freed":
        return resized(torch.ones(40, device=device()), 0)
    if request.param == "shrunk":
        return resized(torch.ones(40, device=device()), 159)
    return resized(torch.ones(80, device=device())[40:], 319)


def test_a_save_refuses_a_storage_that_is_too_small(tmp_path: Path, bad: torch.Tensor) -> None:
    said = "^tensor 'bad': its storage has"
    tensors = {"good": torch.ones(3, device=device()), "bad": bad}
    for attempt in (
        lambda: save(tensors),
        lambda: save_file(tensors, tmp_path / "f"),
        lambda: save_model(model_of(tensors), tmp_path / "f"),
        lambda: save_sharded(tensors, tmp_path),
    ):
        with pytest.raises(RuntimeError, match=said):
            attempt()
    with IncrementalWriter(tmp_path / "f", {"bad": bad}) as writer:
        with pytest.raises(RuntimeError, match=said):
            writer.write("bad", bad)
        writer.discard()
    assert entries(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_load_model_refuses_it(tmp_path: Path, bad: torch.Tensor, dtype: torch.dtype) -> None:
    model = model_of({"a": torch.zeros(3, device=device()), "bad": bad})
    path = write(tmp_path / "f", {"a": torch.ones(3, dtype=dtype), "bad": torch.ones(40, dtype=dtype)})
    with pytest.raises(RuntimeError, match="^tensor 'bad': its storage has"):
        load_model(model, path)
    assert model.a.cpu().eq(0).all()


def test_memory_that_is_freed_during_a_load_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued copies run before the next use of the memory."""
    monkeypatch.setattr(_progress, "STEP_SECONDS", 0.0)
    reserve(2)
    accelerator.set_delay(0)
    model = model_of({f"t{i}": torch.zeros(COUNT, device=device()) for i in range(4)})
    path = write(tmp_path / "f", {f"t{i}": torch.ones(COUNT) for i in range(4)})
    others: list[torch.Tensor] = []
    address = model.t0.data_ptr()

    def progress(done: int, total: int) -> None:
        # Only after the first copies are queued.
        if others or done == 0:
            return
        resized(model.t0, 0)
        others.append(torch.full((COUNT,), 7.0, device=device()))
        assert others[0].data_ptr() == address
        # If the number arrives before the copies, they overwrite it.
        deadline = time.monotonic() + 0.3
        while not accelerator.default_stream().query() and time.monotonic() < deadline:
            time.sleep(0.01)

    with held_pool():
        with pytest.raises(RuntimeError, match="^tensor 't0': its memory was freed, resized or replaced"):
            load_model(model, path, progress=progress)
    assert others[0].cpu().eq(7).all()


def test_a_tensor_that_is_freed_during_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(_progress, "STEP_SECONDS", 0.0)
    tensors = {f"t{i:02}": values(COUNT, i).to(device()) for i in range(12)}
    (tmp_path / "f").write_bytes(b"old")

    def progress(done: int, total: int) -> None:
        if done < total - 4 * COUNT and tensors["t11"].untyped_storage().nbytes():
            resized(tensors["t11"], 0)

    with pytest.raises(RuntimeError, match="^tensor 't11': its memory was freed, resized or replaced"):
        save_file(tensors, tmp_path / "f", progress=progress)
    assert entries(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"
