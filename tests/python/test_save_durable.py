"""durable=True: the file is on the disk when save_file or save_model returns; without it, it need not be."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from safetensors_torch import save_file, save_model

_CACHESTAT = 451  # the number of the system call on every architecture, Linux 6.5 and later


def dirty_pages(path: Path) -> int:
    """How many pages of the file are in memory alone, or on their way to the disk."""
    libc = ctypes.CDLL(None, use_errno=True)
    whole, told = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        status = libc.syscall(_CACHESTAT, file.fileno(), whole, told, 0)
    if status != 0:
        pytest.skip(f"this kernel does not tell: {os.strerror(ctypes.get_errno())}")
    return told[1] + told[2]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


TENSORS = {"weight": torch.arange(3_000_000)}


def test_a_plain_save_leaves_writing_to_the_kernel(target: Path) -> None:
    save_file(TENSORS, target)
    if dirty_pages(target) == 0:
        pytest.skip("this filesystem keeps nothing back")


@pytest.mark.parametrize("replaced", [False, True])
def test_save_file(replaced: bool, target: Path) -> None:
    if replaced:
        save_file({"old": torch.zeros(5_000_000)}, target)
    save_file(TENSORS, target)
    plain = target.read_bytes()
    save_file(TENSORS, target, durable=True)
    assert dirty_pages(target) == 0
    assert target.read_bytes() == plain
    assert os.listdir(target.parent) == [target.name]


def test_save_model(target: Path) -> None:
    save_model(torch.nn.Linear(1000, 1000), target, durable=True)
    assert dirty_pages(target) == 0


@pytest.mark.parametrize("durable", [1, None, "yes"])
def test_it_is_a_bool(durable: object, target: Path) -> None:
    with pytest.raises(TypeError, match="durable must be a bool"):
        save_file(TENSORS, target, durable=durable)
    assert not target.exists()
