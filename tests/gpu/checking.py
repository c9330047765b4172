"""What checks are made of: their list, what they start from, how they fail, and what they ask of tensors.

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
RING = 64 * MIB

Figures = dict[str, float] | None


class Skip(Exception):
    """A check that this machine cannot do; the text says why."""


class Wrong(Exception):
    """What a check found; the text says what."""


@dataclass(frozen=True)
class Setting:
    """What a check starts from.

    Attributes:
        device: the device, current, with nothing on it.
        directory: an empty directory.
    """

    device: devices.Device
    directory: Path

    @property
    def large(self) -> int:
        """The bytes of a file that is much larger than all that transfers may have."""
        return (192 if self.device.simulated else 1024) * MIB

    def path(self, name: str = "model") -> Path:
        return self.directory / f"{name}.safetensors"


Work = Callable[[Setting], Figures]


@dataclass(frozen=True)
class Check:
    """One check: its name, and the function that does it, which may give figures for the report."""

    name: str
    work: Work


CHECKS: list[Check] = []


def check(name: str) -> Callable[[Work], Work]:
    """Adds a function to the list of the checks."""

    def add(work: Work) -> Work:
        CHECKS.append(Check(name, work))
        return work

    return add


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A CPU tensor of random bits, other ones for each seed."""
    itemsize = torch.empty((), dtype=dtype).element_size()
    count = itemsize * torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A CPU tensor of random numbers, other ones for each seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def demand(holds: bool, otherwise: str) -> None:
    """Fails the check where something does not hold."""
    if not holds:
        raise Wrong(otherwise)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors, wherever they are, have one dtype and shape, and the same bits."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(*(data.raw(tensor.detach().contiguous().cpu()) for tensor in (found, expected)))


def demand_same(found: data.Tensors, expected: data.Tensors, device: torch.device, when: str = "") -> None:
    """Fails the check where tensors are not those that are expected, on the device."""
    demand(set(found) == set(expected), f"{when}: other names came out: {sorted(set(found) ^ set(expected))[:5]}")
    for name, tensor in expected.items():
        there = found[name]
        demand(there.device == device, f"{when}: {name} is on {there.device}")
        demand(same_bits(there, tensor), f"{when}: {name}, {tensor.dtype} {tuple(tensor.shape)}, has other data")
