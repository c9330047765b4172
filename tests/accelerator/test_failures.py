"""What is left when a transfer ends early: by an error, by Ctrl-C, or by whoever is told of its progress."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import accelerator
import safetensors_torch
from accelerator import device, hold, release
from safetensors_torch import SafetensorError, load, load_file, load_model, safe_open, save, save_file
from support_accelerator import (
    MIB,
    SLAB,
    allocated,
    assert_equal,
    descriptors,
    held_pool,
    interrupted,
    nothing_left,
    reserve,
    threads,
    values,
    write,
)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {f"t{i:02}": values(MIB // 4 * 3, i) for i in range(12)}


@pytest.fixture
def large(tmp_path: Path, state: dict) -> Path:
    """36 MiB, more than the ring has."""
    return write(tmp_path / "large.safetensors", state)


@pytest.fixture(autouse=True)
def small_ring() -> None:
    reserve(4)


def test_out_of_device_memory(large: Path, state: dict, tmp_path: Path) -> None:
    accelerator.set_memory_limit(0, 20 * MIB)
    with nothing_left(tmp_path):
        with pytest.raises(torch.OutOfMemoryError, match=r"tensor 't06' of 3145728 bytes: .*out of memory"):
            load_file(large, device())
        accelerator.set_memory_limit(0, None)
        reserve(4)
        assert_equal(load_file(large, device()), state)


def test_out_of_memory_for_the_conversion(large: Path, state: dict, tmp_path: Path) -> None:
    accelerator.set_memory_limit(0, 18 * MIB + 1000)
    with nothing_left(tmp_path):
        with pytest.raises(torch.OutOfMemoryError, match=r"memory to convert tensors in, of 2097152 bytes: .*out of"):
            load_file(large, device(), dtype=torch.float16)
        accelerator.set_memory_limit(0, None)
        expected = {name: tensor.half() for name, tensor in state.items()}
        assert_equal(load_file(large, device(), dtype=torch.float16), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_a_copy_that_fails(large: Path, state: dict, tmp_path: Path, count: int) -> None:
    with nothing_left(tmp_path), held_pool():
        timer = threading.Timer(0.2, release_all)
        timer.start()
        accelerator.fail_copy_after(count)
        with pytest.raises(RuntimeError, match=r"tensor 't\d\d' cannot be copied to testaccel:0: .*injected"):
            load_file(large, device())
        # Memory that the copies before the failure still write to is not given away before they are done.
        new = [torch.full((MIB // 4 * 3,), 3.0, device=device()) for _ in range(12)]
        timer.join()
        accelerator.synchronize()
        assert all(torch.equal(tensor.cpu(), torch.full((MIB // 4 * 3,), 3.0)) for tensor in new)
        del new
        assert_equal(load_file(large, device()), state)


def release_all() -> None:
    torch.ops.testaccel.release_all()


@pytest.mark.parametrize("count", [1, 4, 13])
def test_a_copy_to_the_host_that_fails(state: dict, tmp_path: Path, count: int) -> None:
    moved = {name: tensor.to(device()) for name, tensor in state.items()}
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with nothing_left(tmp_path):
        for attempt in (lambda: save_file(moved, target), lambda: save(moved)):
            accelerator.fail_copy_after(count)
            with pytest.raises(RuntimeError, match=r"tensor 't\d\d' cannot be copied from testaccel:0: .*injected"):
                attempt()
        assert target.read_bytes() == b"old"
        assert save(moved) == save(state)


def test_a_disk_that_is_full(state: dict, tmp_path: Path) -> None:
    moved = {name: tensor.to(device()) for name, tensor in state.items()}
    with nothing_left(tmp_path), pytest.raises(OSError) as raised:
        save_file(moved, "/dev/full")
    assert raised.value.errno == errno.ENOSPC
    del raised


@pytest.mark.parametrize("read", ["get_tensors", "get_tensor", "get_slice", "load_model"])
def test_a_file_that_is_cut_short_meanwhile(large: Path, state: dict, tmp_path: Path, read: str) -> None:
    model = nn.Module()
    for name in state:
        model.register_buffer(name, torch.zeros(MIB // 4 * 3, device=device()))
    with nothing_left(tmp_path):
        assert "something is writing to it" in cut_short_while_read(large, read, model)


def cut_short_while_read(path: Path, read: str, model: nn.Module) -> str:
    """What is said of a file that becomes shorter after it was opened. On return, nobody has it open."""
    file = safe_open(path, device=device(), backend="pread")
    native = torch.classes.safetensors_torch.File(str(path), "pread")
    os.truncate(path, 30 * MIB)
    attempts: dict[str, Callable[[], object]] = {
        "get_tensors": file.get_tensors,
        "get_tensor": lambda: file.get_tensor("t11"),
        "get_slice": lambda: file.get_slice("t11")[1000:],
        "load_model": lambda: native.start_state(dict(model.state_dict()), [], "", True, "").advance(60.0),
    }
    error = SafetensorError if read != "load_model" else RuntimeError
    with pytest.raises(error, match=r"large\.safetensors: the file became shorter.*for tensor \"t(09|1\d)\"") as raised:
        attempts[read]()
    return str(raised.value)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_what_a_progress_function_raises_ends_the_load(
    large: Path, state: dict, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    class Enough(Exception):
        pass

    def tell(done: int, total: int) -> None:
        if done < total:
            raise Enough

    with nothing_left(tmp_path):
        hold(0)
        with pytest.raises(Enough):
            load_file(large, device(), dtype=dtype, progress=tell)
        release(0)
        assert_equal(load_file(large, device()), state)


def test_what_a_progress_function_raises_ends_the_save(state: dict, tmp_path: Path) -> None:
    moved = {name: tensor.to(device()) for name, tensor in state.items()}

    def tell(done: int, total: int) -> None:
        if done < total:
            raise KeyError("enough")

    with nothing_left(tmp_path):
        hold(0)
        with pytest.raises(KeyError):
            save_file(moved, tmp_path / "target", progress=tell)
        release(0)


@pytest.mark.parametrize("slabs", [4, 0])
def test_an_interrupt_ends_a_load(large: Path, state: dict, tmp_path: Path, slabs: int) -> None:
    attempts = {
        "load_file": lambda: load_file(large, device()),
        "load": lambda: load(large.read_bytes(), device()),
        "converted": lambda: load_file(large, device(), dtype=torch.float64),
        "get_tensors": lambda: safe_open(large, device=device()).get_tensors(),
    }
    with nothing_left(tmp_path):
        for attempt in attempts.values():
            reserve(slabs)
            hold(0)
            with interrupted():
                attempt()
            release(0)
            accelerator.synchronize()
        assert_equal(load_file(large, device()), state)


def test_an_interrupt_ends_a_load_into_a_model(large: Path, state: dict, tmp_path: Path) -> None:
    model = nn.Module()
    for name in state:
        model.register_buffer(name, torch.zeros(MIB // 4 * 3, device=device()))
    with nothing_left(tmp_path):
        hold(0)
        with interrupted():
            load_model(model, large)
        release(0)
        load_model(model, large)
        assert_equal(dict(model.state_dict()), state)


@pytest.mark.parametrize("slabs", [4, 0])
def test_an_interrupt_ends_a_save(state: dict, tmp_path: Path, slabs: int) -> None:
    reserve(slabs)
    moved = {name: tensor.to(device()) for name, tensor in state.items()}
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with nothing_left(tmp_path):
        hold(0)
        with interrupted():
            save_file(moved, target)
        assert target.read_bytes() == b"old"
        with interrupted():
            save(moved)
        release(0)
        save_file(moved, target)
        assert target.read_bytes() == save(state)
        target.write_bytes(b"old")


def test_nothing_piles_up(large: Path, state: dict, tmp_path: Path) -> None:
    accelerator.set_delay(0)

    def once() -> None:
        loaded = load_file(large, device(), names=["t00", "t05", "t11"])
        save_file(loaded, tmp_path / "saved")
        load(b"\2\0\0\0\0\0\0\0{}", device())

    def seen() -> tuple[int, ...]:
        return allocated(), threads(), descriptors(), safetensors_torch.transfer_memory()

    for _ in range(3):
        once()
    before = seen()
    for _ in range(100):
        once()
    assert seen() == before
    assert accelerator.statistics()["live_events"] <= 2 * 4 + 2


def test_after_a_failed_pinning_the_plain_way_is_taken(large: Path, state: dict) -> None:
    safetensors_torch.release_transfer_memory()
    accelerator.fail_pinning(True)
    assert safetensors_torch.reserve_transfer_memory(8 * SLAB) == 0
    assert_equal(load_file(large, device()), state)
    accelerator.fail_pinning(False)
    assert safetensors_torch.reserve_transfer_memory(4 * SLAB) == 4 * SLAB
