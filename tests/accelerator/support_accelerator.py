"""Helpers of the tests of transfers: files, pinned pools of a fixed size, stopped streams, and what is left.

Owns no test.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import accelerator
import safetensors_torch
from accelerator import device, hold_stream, release_stream
from proc import ctrl_c_interrupts, eventually
from support import entries

SLAB = 2 << 20
MIB = 1 << 20


def values(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns random numbers of the dtype, a different sequence for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator).to(dtype)


def sample() -> dict[str, torch.Tensor]:
    """Returns tensors at all positions in a slab: larger than one, smaller, empty, of odd sizes; 30 MB in total."""
    tensors = {f"small.{i:03}": values(i * 7 % 50 + 1, i) for i in range(60)}
    for i, count in enumerate((SLAB // 4, SLAB // 4 - 1, SLAB // 4 + 1, 3 * SLAB // 4 + 5, 1_000_003)):
        tensors[f"large.{i}"] = values(count, 1000 + i)
    tensors["half"] = values(700_001, 1, torch.float16).reshape(-1, 1)
    tensors["bytes"] = torch.arange(SLAB + 12345).to(torch.uint8)
    tensors["mask"] = torch.arange(77) % 3 == 0
    tensors["step"] = torch.tensor(12345)
    tensors["empty"] = torch.zeros(0, 5)
    return tensors


def reserve(slabs: int) -> None:
    """Gives the pinned pool exactly this many slabs."""
    safetensors_torch.release_transfer_memory()
    safetensors_torch.set_transfer_options(pinned_pool_bytes=slabs * SLAB)
    assert safetensors_torch.reserve_transfer_memory(slabs * SLAB) == slabs * SLAB


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors_torch.save_file(tensors, path)
    return path


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], index: int = 0) -> None:
    """Checks that names, dtypes, shapes and bits are equal, and all tensors are on the device."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].device == device(index), name
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].cpu(), tensor), name


@contextmanager
def held_pool(index: int = 0) -> Iterator[None]:
    """Stops the streams of the device's pool while the body runs."""
    streams = {stream.stream_id: stream for stream in (torch.Stream(device=device(index)) for _ in range(16))}
    for stream in streams.values():
        hold_stream(stream)
    try:
        yield
    finally:
        for stream in streams.values():
            release_stream(stream)


@contextmanager
def no_waits() -> Iterator[None]:
    """Checks that the body waits for neither a device nor a stream."""
    before = accelerator.statistics()
    yield
    after = accelerator.statistics()
    for what in ("device_waits", "stream_waits", "event_waits", "blocking_copies"):
        assert after[what] == before[what], what


def allocated() -> int:
    gc.collect()
    return accelerator.statistics()["devices"][0]["allocated"]


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """The body leaves neither device memory nor threads, descriptors, slabs in use, or files."""
    before = (allocated(), threads(), descriptors(), entries(tmp_path))
    yield
    # The test backend starts a thread for each stream when it is used first.
    assert eventually(lambda: (allocated(), descriptors(), entries(tmp_path)) == (before[0], *before[2:]))
    assert eventually(lambda: not any(name == "safetensors" for name in thread_names()))
    accelerator.synchronize()
    pinned = safetensors_torch.transfer_memory()
    assert safetensors_torch.release_transfer_memory() == pinned, "all slabs wait for the next transfer"
    assert accelerator.statistics()["pinned_in_use"] == 0


def thread_names() -> list[str]:
    return [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]


@contextmanager
def interrupted(seconds: float = 0.3) -> Iterator[None]:
    """The body, which cannot go on, is interrupted as by Ctrl-C, and ends within a second of that."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, send)
    with ctrl_c_interrupts(), pytest.raises(KeyboardInterrupt):
        timer.start()
        yield
    assert time.monotonic() - sent[0] < 1
    timer.join()
