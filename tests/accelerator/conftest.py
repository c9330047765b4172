"""Registers the test accelerator. These tests need their own pytest process: no other test may see the backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import accelerator

# Where the helpers of the other tests are.
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
accelerator.load()

import safetensors_torch  # noqa: E402
from support_accelerator import MIB, reserve, sample, write  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Resets the device, so that no setting, hold or queued work of a test reaches the next."""
    _reset()
    yield
    _reset()


def _reset() -> None:
    accelerator.reset()
    safetensors_torch.set_transfer_options(pinned_pool_bytes=64 * MIB, threads=0)
    safetensors_torch.release_transfer_memory()


@pytest.fixture(params=["pinned", "few slabs", "one thread", "plain", "no streams", "no pinning"])
def mode(request: pytest.FixtureRequest) -> str:
    """A mode in which bytes are copied to the device and back."""
    accelerator.set_delay(30)  # most tests wait for several hundred copies
    if request.param == "pinned":
        reserve(32)
    elif request.param == "few slabs":
        reserve(3)
    elif request.param == "one thread":
        reserve(5)
        safetensors_torch.set_transfer_options(threads=1)
    elif request.param == "plain":
        safetensors_torch.set_transfer_options(pinned_pool_bytes=0)
    elif request.param == "no streams":
        reserve(4)
        accelerator.no_streams(True)
    else:
        accelerator.fail_pinning(True)
    return request.param


@pytest.fixture
def overlaps(mode: str) -> bool:
    """Whether copies run on their own stream in this mode."""
    return mode in ("pinned", "few slabs", "one thread")


@pytest.fixture(scope="session")
def tensors() -> dict[str, torch.Tensor]:
    return sample()


@pytest.fixture(scope="session")
def path(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("files") / "model.safetensors", tensors)
