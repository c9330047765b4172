"""Checkpoints of several files beside huggingface_hub, which names and divides them for all of Hugging Face's tools."""

from __future__ import annotations

import json
import random
from pathlib import Path

import huggingface_hub
import pytest
import torch

import safetensors_torch


def random_state(seed: int) -> dict[str, torch.Tensor]:
    generator = random.Random(seed)
    names = [f"layer.{i}.\u00e4\n{generator.randrange(99)}" for i in range(generator.randrange(2, 30))]
    dtypes = (torch.float32, torch.float16, torch.uint8, torch.int64)
    return {
        name: torch.randint(0, 100, (generator.randrange(1, 40),)).to(generator.choice(dtypes)) for name in set(names)
    }


def save(tensors: dict[str, torch.Tensor], directory: Path, max_shard_size: int) -> list[str]:
    return safetensors_torch.save_sharded(tensors, directory, max_shard_size=max_shard_size)


def load(path: Path, backend: str) -> dict[str, torch.Tensor]:
    return safetensors_torch.load_sharded(path, backend=backend)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("seed", range(40))
def test_division_and_names_are_those_of_huggingface_hub(tmp_path: Path, seed: int) -> None:
    state = random_state(seed)
    limit = random.Random(seed).randrange(1, 600)
    split = huggingface_hub.split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    names = save(state, tmp_path, limit)
    assert set(names) - {"model.safetensors.index.json"} == set(split.filename_to_tensors)
    for name, tensors in split.filename_to_tensors.items():
        assert set(safetensors_torch.load_file(tmp_path / name)) == set(tensors)
    if split.is_sharded:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for backend in ("mmap", "pread"):
        assert_equal(load(tmp_path, backend), state)


@pytest.mark.parametrize("limit", [100, 10**9])
def test_what_huggingface_hub_writes_is_read(tmp_path: Path, limit: int) -> None:
    state = random_state(7)
    huggingface_hub.save_torch_state_dict(state, tmp_path, max_shard_size=limit)
    assert (limit == 100) == (tmp_path / "model.safetensors.index.json").exists()
    assert_equal(load(tmp_path, "mmap"), state)


@pytest.mark.parametrize("limit", [100, 10**9])
def test_what_we_write_is_read_by_huggingface_hub(tmp_path: Path, limit: int) -> None:
    state = random_state(8)
    save(state, tmp_path, limit)
    model = torch.nn.Module()
    for name, tensor in state.items():
        model.register_buffer(name.replace(".", "_"), torch.zeros_like(tensor))
    renamed = {name.replace(".", "_"): tensor for name, tensor in state.items()}
    save(renamed, tmp_path, limit)
    huggingface_hub.load_torch_model(model, tmp_path, strict=True)
    assert_equal(dict(model.named_buffers()), renamed)
