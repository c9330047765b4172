"""Checkpoints of several files, from and to a device: the same modes as for one, file after file."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import accelerator
from accelerator import device
from safetensors_torch import load_file
from support_accelerator import assert_equal

CLASSES = torch.classes.safetensors_torch
MAX_SHARD_BYTES = 5_000_000


def finish(pending: object) -> object:
    while not pending.advance(0.05):
        assert pending.done() <= pending.total()
    assert pending.done() == pending.total()
    return pending.result()


def save(tensors: dict[str, torch.Tensor], directory: Path, max_shard_size: int = MAX_SHARD_BYTES) -> list[str]:
    return finish(pending_save(tensors, directory, max_shard_size))


def pending_save(tensors: dict[str, torch.Tensor], directory: Path, max_shard_size: int = MAX_SHARD_BYTES) -> Any:
    names, values = list(tensors), list(tensors.values())
    arguments = (names, values, {"format": "pt"}, str(directory), "model", max_shard_size)
    return CLASSES.PendingShardedSave(*arguments, False, "error", False)


def opened(directory: Path, backend: str) -> Any:
    pending = CLASSES.PendingFile(str(directory), backend, None, "error")
    assert pending.advance(60.0)
    return pending.result()


@pytest.fixture
def directory(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    assert len(save(tensors, tmp_path / "shards")) > 5
    return tmp_path / "shards"


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_all_shards_come_to_the_device(directory: Path, tensors: dict, mode: str, backend: str) -> None:
    file = opened(directory, backend)
    names, loaded = finish(file.start_load(None, device(), None, None))
    assert_equal(dict(zip(names, loaded, strict=True)), tensors)


def test_shards_are_converted_and_selected(directory: Path, tensors: dict, mode: str) -> None:
    chosen = ["large.3", "small.007", "half", "bytes", "empty"]
    names, loaded = finish(opened(directory, "mmap").start_load(chosen, device(1), torch.bfloat16, None))
    expected = {name: tensors[name] for name in chosen}
    expected = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in expected.items()}
    assert_equal(dict(zip(names, loaded, strict=True)), expected, 1)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_parameters_are_filled_from_shards(directory: Path, tensors: dict, mode: str, backend: str) -> None:
    state = {name: torch.zeros_like(tensor, device=device()) for name, tensor in tensors.items()}
    on_host = {name: torch.zeros_like(tensors[name]) for name in ("large.1", "step")}
    gc.collect()
    accelerator.reset_statistics()
    allocated = accelerator.statistics()["devices"][0]["allocated"]
    file = opened(directory, backend)
    missing, unexpected = finish(file.start_state({**state, **on_host}, [], "Net", True, ""))
    assert (missing, unexpected) == ([], [])
    assert accelerator.statistics()["devices"][0]["peak"] == allocated
    for name in on_host:
        assert torch.equal(on_host[name], tensors[name])
        state.pop(name)
    assert_equal(state, {name: tensors[name] for name in state})


def test_shards_are_saved_from_the_device(tmp_path: Path, directory: Path, tensors: dict, mode: str) -> None:
    there = {name: tensor.to(device()) for name, tensor in tensors.items()}
    names = save(there, tmp_path / "again")
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()
    found = {k: v for name in names[:-1] for k, v in load_file(tmp_path / "again" / name).items()}
    assert found.keys() == tensors.keys()


def test_a_cancelled_save_leaves_the_directory_alone(directory: Path, tensors: dict, mode: str) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    there = {name: tensor.to(device()) + 1 for name, tensor in tensors.items()}
    save = pending_save(there, directory)
    assert not save.advance(0.0)
    save.cancel()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
