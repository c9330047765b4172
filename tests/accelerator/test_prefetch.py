"""prefetch and iterate to a device: values, dtypes, and what is left after a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import accelerator
from accelerator import device
from safetensors_torch import SafetensorError, iterate, safe_open
from support_accelerator import MIB, assert_equal, values, write
from test_failures import nothing_left


@pytest.mark.parametrize("index", [0, 1])
def test_prefetch(path: Path, tensors: dict, index: int) -> None:
    with safe_open(path) as file, file.prefetch(device=device(index), buffer_bytes=MIB) as loader:
        taken = {name: loader.take(name) for name in ("large.3", "small.007", "empty")}
        assert_equal({**dict(loader), **taken}, tensors, index)
    with safe_open(path, device=device(index)) as file:
        assert_equal(dict(file.prefetch({"large.3": slice(1, 5)})), {"large.3": tensors["large.3"][1:5]}, index)


def test_iterate_converts(path: Path, tensors: dict) -> None:
    expected = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    assert_equal(dict(iterate([path], device(), dtype="float16")), expected)


def test_out_of_device_memory(tmp_path: Path) -> None:
    state = {f"t{i:02}": values(MIB // 4 * 3, i) for i in range(12)}
    path = write(tmp_path / "large.safetensors", state)
    accelerator.set_memory_limit(0, 20 * MIB)
    with nothing_left(tmp_path):
        with safe_open(path) as file:
            loader = file.prefetch(device=device())
        kept = []
        with pytest.raises(torch.OutOfMemoryError, match=r"tensor 't06' of 3145728 bytes: .*out of memory"):
            kept.extend(tensor for _, tensor in loader)
        with pytest.raises(SafetensorError, match="PrefetchLoader is closed"):
            loader.take("t07")
        del kept, loader
        accelerator.set_memory_limit(0, None)
