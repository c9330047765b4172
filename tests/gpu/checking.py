"""The list of checks, their setting, their failures, and comparisons of tensors.

Owns no check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import devices

MIB = 1 << 20
SLAB = 2 * MIB
POOL = 64 * MIB

Figures = dict[str, float] | None


class Skip(Exception):
    """A check that this machine cannot run. The text says why."""


class Wrong(Exception):
    """A failed check. The text says what is wrong."""


@dataclass(frozen=True)
class Setting:
    """The setting of a check.

    Attributes:
        device: the device, current, with nothing on it.
        directory: an empty directory.
    """

    device: devices.Device
    directory: Path

    @property
    def large(self) -> int:
        """The size of a file that is much larger than the memory of transfers."""
        return (192 if self.device.simulated else 1024) * MIB

    def path(self, name: str = "model") -> Path:
        return self.directory / f"{name}.safetensors"


Work = Callable[[Setting], Figures]


@dataclass(frozen=True)
class Check:
    """One check: its name and its function, which may return figures for the report."""

    name: str
    work: Work


CHECKS: list[Check] = []


def check(name: str) -> Callable[[Work], Work]:
    """Adds a function to the list of checks."""

    def add(work: Work) -> Work:
        CHECKS.append(Check(name, work))
        return work

    return add


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Returns a CPU tensor of random bits, different for each seed."""
    itemsize = torch.empty((), dtype=dtype).element_size()
    count = itemsize * torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Returns a CPU tensor of random numbers, different for each seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def demand(holds: bool, otherwise: str) -> None:
    """Fails the check unless ``holds``."""
    if not holds:
        raise Wrong(otherwise)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Returns whether two tensors, on any devices, have the same dtype, shape and bits."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(*(data.raw(tensor.detach().contiguous().cpu()) for tensor in (found, expected)))


def demand_same(found: data.Tensors, expected: data.Tensors, device: torch.device, when: str = "") -> None:
    """Fails the check unless the tensors are the expected ones, on the device."""
    demand(set(found) == set(expected), f"{when}: other names came out: {sorted(set(found) ^ set(expected))[:5]}")
    for name, tensor in expected.items():
        there = found[name]
        demand(there.device == device, f"{when}: {name} is on {there.device}")
        demand(same_bits(there, tensor), f"{when}: {name}, {tensor.dtype} {tuple(tensor.shape)}, has other data")
