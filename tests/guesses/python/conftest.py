"""The files that the guesses find in their working directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import safetensors_torch


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a file, `model.safetensors`, and a checkpoint of three files, `checkpoint/`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tensors = {"weight": torch.randn(2, 3), "bias": torch.zeros(2), "steps": torch.tensor(7)}
    safetensors_torch.save_file(tensors, "model.safetensors", {"format": "pt"})
    layers = {f"layers.{i}.weight": torch.full((2, 3), float(i)) for i in range(3)}
    safetensors_torch.save_sharded(layers, "checkpoint", max_shard_size=24)
    return tmp_path
