"""Tensors of the cases of test_distributed, whole and divided among four processes, and how to compare them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import safetensors_torch
from safetensors_torch import distributed as std

Tensors = dict[str, torch.Tensor]


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """A mesh of four processes, and one of two by two."""
    return DeviceMesh("cpu", torch.arange(4)), DeviceMesh("cpu", torch.arange(4).reshape(2, 2))


def divide(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    """Returns a DTensor of the elements that local_ranges gives this process."""
    coordinate = mesh.get_coordinate()
    local = whole
    for dim, held in enumerate(std.local_ranges(whole.shape, mesh.shape, coordinate, placements)):
        index = torch.tensor([i for begin, end in held for i in range(begin, end)], dtype=torch.int64)
        local = local.index_select(dim, index)
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def wholes(seed: int = 0) -> dict[str, tuple[torch.Tensor, int, list[Any]]]:
    """Whole tensors, the same in all processes; with the number of the mesh and the placements."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    numbers = torch.randint(-100, 100, (7, 3), generator=generator)
    return {
        "rows": (random(8, 6), 0, [Shard(0)]),
        "columns": (random(6, 12, dtype=torch.bfloat16), 0, [Shard(1)]),
        "third": (random(2, 3, 9, dtype=torch.float64), 0, [Shard(2)]),
        "uneven": (random(5, 3), 0, [Shard(0)]),
        "mostly_empty": (random(2, 3), 0, [Shard(0)]),
        "replicated": (random(4, 4), 0, [Replicate()]),
        "hsdp": (random(6, 5), 1, [Replicate(), Shard(0)]),
        "both": (random(6, 8), 1, [Shard(0), Shard(1)]),
        "fsdp_tp": (random(16, 3), 1, [_StridedShard(0, split_factor=2), Shard(0)]),
        "ints": (numbers, 0, [Shard(0)]),
        "bools": (numbers > 0, 0, [Shard(1)]),
        "float8": (random(8, 4).to(torch.float8_e4m3fn), 0, [Shard(0)]),
        "nothing": (random(0, 4), 0, [Shard(0)]),
    }


def distributed(seed: int = 0) -> tuple[Tensors, Tensors]:
    """Whole tensors, and what this process has of them."""
    mesh = meshes()
    whole: Tensors = {}
    mine: Tensors = {}
    for name, (tensor, number, placements) in wholes(seed).items():
        whole[name] = tensor
        mine[name] = divide(tensor, mesh[number], placements)
    whole["scalar"] = mine["scalar"] = torch.tensor(2.5 + seed)
    whole["tied"] = mine["tied"] = whole["scalar"]
    whole["transposed"] = torch.arange(6.0).reshape(2, 3).t() + seed
    mine["transposed"] = whole["transposed"]
    return whole, mine


def lone_strided(whole: torch.Tensor) -> DTensor:
    return divide(whole, meshes()[0], [_StridedShard(0, split_factor=2)])


def saved(tensors: Tensors, path: Path) -> bytes:
    """Returns what save_file writes for whole tensors."""
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors_torch.save_file(contiguous, path, {"format": "pt"})
    return path.read_bytes()


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def strays(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


@contextlib.contextmanager
def failing(*kinds: type[BaseException], text: str = "") -> Iterator[None]:
    """Expects an error of one of these kinds with this text."""
    try:
        yield
    except kinds as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no error: {text}")
