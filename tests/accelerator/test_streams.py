"""The order between streams, and between a stream and the host: what waits, and what does not.

Tests hold streams to fix an order. Each test fails if one wait or one event is missing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import accelerator
import safetensors_torch
from accelerator import device, hold, on_stream, release
from proc import eventually
from safetensors_torch import load, load_file, load_model, safe_open, save, save_file
from support import encode
from support_accelerator import MIB, SLAB, assert_equal, held_pool, no_waits, reserve, values, write

COUNT = MIB // 4


def single(tmp_path: Path, value: float = 1.0, count: int = COUNT) -> Path:
    return write(tmp_path / f"{value}.safetensors", {"x": torch.full((count,), float(value))})


def one(value: float, count: int = COUNT) -> dict[str, torch.Tensor]:
    return {"x": torch.full((count,), float(value))}


def from_bytes(path: Path, where: torch.device) -> torch.Tensor:
    return load(path.read_bytes(), where)["x"]


def from_slice(path: Path, where: torch.device) -> torch.Tensor:
    with safe_open(path, device=where) as file:
        return file.get_slice("x")[:]


def from_model(path: Path, where: torch.device) -> torch.Tensor:
    model = nn.Module()
    model.register_buffer("x", torch.empty(COUNT, device=where))
    load_model(model, path)
    return model.x


READERS: dict[str, Callable[[Path, torch.device], torch.Tensor]] = {
    "load_file": lambda path, where: load_file(path, where)["x"],
    "converted": lambda path, where: load_file(path, where, dtype=torch.float64)["x"],
    "load": from_bytes,
    "get_tensor": lambda path, where: safe_open(path, device=where).get_tensor("x"),
    "get_slice": from_slice,
    "load_model": from_model,
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@pytest.fixture(autouse=True)
def warm_ring() -> None:
    reserve(8)


@every_reader
def test_the_current_stream_sees_what_was_loaded(tmp_path: Path, read: Callable) -> None:
    path = single(tmp_path)
    with held_pool():
        with no_waits():
            loaded = read(path, device())
            seen = loaded.clone()
        # Nothing is copied yet: the clone above is queued behind the copies.
        assert not accelerator.default_stream().query()
    assert torch.equal(seen.cpu(), torch.ones(COUNT, dtype=seen.dtype))


@every_reader
def test_queued_work_of_the_current_stream_comes_first(tmp_path: Path, read: Callable) -> None:
    path = single(tmp_path)
    # Memory of freed tensors with a queued write: the allocator reuses it for the next tensor.
    old = [torch.zeros(COUNT, dtype=dtype, device=device()) for dtype in (torch.float32, torch.float64)]
    accelerator.synchronize()
    hold(0)
    for tensor in old:
        tensor.fill_(5)
    addresses = {tensor.data_ptr() for tensor in old}
    del old, tensor
    loaded = read(path, device())
    assert loaded.data_ptr() in addresses
    time.sleep(0.02)  # work that does not wait is done by now
    release(0)
    assert torch.equal(loaded.cpu(), torch.ones(COUNT, dtype=loaded.dtype))


@every_reader
def test_tensors_may_be_freed_before_their_copies_are_done(tmp_path: Path, read: Callable) -> None:
    path = single(tmp_path)
    with held_pool():
        loaded = read(path, device())
        address, dtype = loaded.data_ptr(), loaded.dtype
        del loaded
        new = torch.full((COUNT,), 9, dtype=dtype, device=device())
        assert new.data_ptr() == address
    accelerator.synchronize()
    assert torch.equal(new.cpu(), torch.full((COUNT,), 9, dtype=dtype))


@every_reader
def test_a_side_stream_can_be_the_current_one(tmp_path: Path, read: Callable) -> None:
    path = single(tmp_path)
    stream = torch.Stream(device=device())
    with on_stream(stream):
        loaded = read(path, device())
        seen = loaded.clone()
    stream.synchronize()
    assert torch.equal(seen.cpu(), torch.ones(COUNT, dtype=seen.dtype))
    assert torch.accelerator.current_stream(0) == accelerator.default_stream(0)


def test_other_streams_are_not_held_up(tmp_path: Path) -> None:
    path = single(tmp_path)
    x = torch.zeros(10, device=device())
    accelerator.synchronize()
    hold(0)
    load_file(path, device())
    others = {stream.stream_id: stream for stream in (torch.Stream(device=device()) for _ in range(16))}
    events = []
    for stream in others.values():
        with on_stream(stream):
            x.fill_(1)
        events.append(stream.record_event())
    # All except the stream of the load, which waits for the current one.
    assert eventually(lambda: sum(event.query() for event in events) == len(events) - 1)
    assert not all(event.query() for event in events)
    release(0)


def test_slabs_are_not_reused_before_their_copies_are_done(tmp_path: Path) -> None:
    # Many times the pinned pool, so that each slab is reused often.
    state = {f"{i}": values(SLAB // 8 * 5, i) for i in range(20)}
    path = write(tmp_path / "a", state)
    reserve(3)
    for delay in (0, 100, 1000):
        accelerator.set_delay(delay, seed=delay)
        assert_equal(load_file(path, device()), state)
        assert_equal(load(path.read_bytes(), device(1)), state, 1)


def test_the_next_load_does_not_reuse_slabs_that_are_being_copied(tmp_path: Path) -> None:
    first, second = single(tmp_path, 1.0), single(tmp_path, 2.0)
    reserve(2)
    found: list[dict] = []
    with held_pool():
        a = load_file(first, device())
        # The second slab is free. The third load has none until the copies from one of them are done.
        b = load_file(second, device())
        thread = threading.Thread(target=lambda: found.append(load_file(second, device())))
        thread.start()
        time.sleep(0.05)
    thread.join()
    assert_equal(a, one(1))
    assert_equal(b, one(2))
    assert_equal(found[0], one(2))
    assert safetensors_torch.transfer_memory() == 2 * SLAB


def test_slabs_of_a_failed_save_are_not_reused_while_they_are_written_to(tmp_path: Path) -> None:
    path = single(tmp_path)
    reserve(1)
    moved = {f"{i}": torch.full((1000,), 9.0, device=device()) for i in range(20)}
    accelerator.synchronize()
    hold(0)
    accelerator.fail_copy_after(10)
    with pytest.raises(RuntimeError, match="injected"):
        save(moved)
    # Nine copies to the slab wait for the current stream. A load on another stream tries to read into it. The pool of
    # streams may return that of the copies, which is not idle.
    stream = next(one for one in (torch.Stream(device=device()) for _ in range(100)) if one.query())
    accelerator.hold_stream(stream)
    found: list[dict] = []

    def load_on_another_stream() -> None:
        with on_stream(stream):
            found.append(load_file(path, device()))

    thread = threading.Thread(target=load_on_another_stream)
    thread.start()
    thread.join(0.1)  # it ends, except for the copy, if it reuses the slab
    release(0)
    accelerator.default_stream().synchronize()
    accelerator.release_stream(stream)
    thread.join()
    accelerator.synchronize()
    assert_equal(found[0], one(1))


def test_released_slabs_are_not_freed_before_their_copies_are_done(tmp_path: Path) -> None:
    path = single(tmp_path)
    reserve(1)
    with held_pool():
        loaded = load_file(path, device())
        thread = threading.Thread(target=safetensors_torch.release_transfer_memory)
        thread.start()
        time.sleep(0.05)
        spoiler = torch.full((SLAB,), 77, dtype=torch.uint8, pin_memory=True)
    thread.join()
    assert_equal(loaded, one(1))
    assert safetensors_torch.transfer_memory() == 0 and spoiler[0] == 77


def writers(tmp_path: Path) -> dict[str, Callable[[dict], bytes]]:
    def through_file(tensors: dict) -> bytes:
        save_file(tensors, tmp_path / "saved")
        return (tmp_path / "saved").read_bytes()

    return {"save_file": through_file, "save": save}


@pytest.mark.parametrize("how", ["save_file", "save"])
def test_a_save_includes_queued_work_of_the_current_stream(tmp_path: Path, how: str) -> None:
    x = torch.zeros(COUNT, device=device())
    accelerator.synchronize()
    hold(0)
    x.fill_(3)
    timer = threading.Timer(0.1, release, [0])
    timer.start()
    assert writers(tmp_path)[how]({"x": x}) == encode(one(3))
    timer.join()


@pytest.mark.parametrize("how", ["save_file", "save"])
def test_a_save_waits_for_what_it_writes(tmp_path: Path, how: str) -> None:
    state = {f"{i}": values(SLAB // 8 * 5, i) for i in range(12)}
    expected = encode({name: tensor.view(torch.int32) for name, tensor in state.items()}).replace(b"I32", b"F32")
    moved = {name: tensor.to(device()) for name, tensor in state.items()}
    for slabs, delay in ((2, 300), (3, 3000), (8, 1000)):
        reserve(slabs)
        accelerator.set_delay(delay, seed=slabs)
        assert writers(tmp_path)[how](moved) == expected


def test_a_save_on_a_side_stream(tmp_path: Path) -> None:
    stream = torch.Stream(device=device())
    x = torch.zeros(COUNT, device=device())
    accelerator.synchronize()
    accelerator.hold_stream(stream)
    timer = threading.Timer(0.1, accelerator.release_stream, [stream])
    with on_stream(stream):
        x.fill_(4)
        timer.start()
        assert save({"x": x}) == encode(one(4))
    timer.join()


def test_threads_load_and_save_at_once(tmp_path: Path) -> None:
    paths = {value: single(tmp_path, value, 3 * COUNT + value) for value in range(1, 7)}
    faults: list[BaseException] = []

    def work(value: int) -> None:
        try:
            for _ in range(6):
                loaded = load_file(paths[value], device(value % 2))
                assert save(loaded) == paths[value].read_bytes()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=[value]) for value in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert safetensors_torch.transfer_memory() <= 8 * SLAB
