"""Tensors that are copied to a device in the background: values, order, memory, streams, and what ends it early."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors
import torch

import accelerator
import safetensors_torch
from accelerator import device, hold, on_stream, release
from proc import eventually
from safetensors_torch import PrefetchLoader, SafetensorError, iterate, safe_open
from support_accelerator import (
    MIB,
    SLAB,
    allocated,
    assert_equal,
    held_pool,
    interrupted,
    no_waits,
    nothing_left,
    reserve,
    values,
    write,
)

COUNT = 3 * MIB // 4
NBYTES = 3 * MIB


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {f"t{i:02}": values(COUNT, i) for i in range(12)}


@pytest.fixture
def large(tmp_path: Path, state: dict) -> Path:
    """Twelve tensors of 3 MiB."""
    return write(tmp_path / "large.safetensors", state)


def prefetch(path: Path, index: int = 0, **options: object) -> PrefetchLoader:
    with safe_open(path) as file:
        return file.prefetch(device=device(index), **options)


def settled() -> int:
    """Returns the bytes of the device once they no longer change."""
    before, now = -1, allocated()
    while now != before:
        time.sleep(0.1)
        before, now = now, allocated()
    return now


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_every_tensor_arrives(path: Path, tensors: dict, mode: str, backend: str, index: int) -> None:
    for buffer_bytes in (None, 5 * MIB, 1):
        accelerator.reset_statistics()
        with safe_open(path, device=device(index), backend=backend) as file:
            loader = file.prefetch(buffer_bytes=buffer_bytes)
        assert_equal(dict(loader), tensors, index)
        seen = accelerator.statistics()
        # assert_equal copies back.
        assert seen["to_device_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        assert list(loader) == []


def test_one_reader_delivers_in_file_order(path: Path, tensors: dict) -> None:
    safetensors_torch.set_transfer_options(threads=1)
    with safe_open(path, device=device()) as file:
        expected = [name for name in file.offset_keys() if tensors[name].nbytes]
        names = [name for name, _ in file.prefetch() if tensors[name].nbytes]
    assert names == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_conversion(path: Path, tensors: dict, mode: str, dtype: torch.dtype) -> None:
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    assert_equal(dict(iterate(path, device(), dtype=dtype)), expected)


def test_files_in_the_order_of_the_call(tmp_path: Path, mode: str) -> None:
    states = [{f"{i}.{j}": values(1000 + 300_000 * j, 10 * i + j) for j in range(4)} for i in range(5)]
    paths = [write(tmp_path / str(i), state) for i, state in enumerate(states)]
    order = [3, 0, 4, 1, 2]
    reached: list[str] = []
    found: dict[str, torch.Tensor] = {}
    for name, tensor in iterate([paths[i] for i in order], device(), buffer_bytes=3 * MIB):
        reached.append(name[0])
        found[name] = tensor
    assert_equal(found, {name: tensor for state in states for name, tensor in state.items()})
    # About: small tensors of the next file may land before the last of this one.
    assert [int(reached[i * 4]) for i in range(5)] == order or len(set(reached[:8])) <= 3


def test_slices(tmp_path: Path, mode: str) -> None:
    x, y = values(3000 * 701).reshape(3000, 701), values(100 * 50 * 20, 1, torch.float16).reshape(100, 50, 20)
    path = write(tmp_path / "a", {"x": x, "y": y, "z": x[:9] + 1})
    plan = {"y": (slice(1, 90, 7), ..., slice(0, 20, 3)), "x": slice(100, 2900), "z": (3,)}
    expected = {"y": y[1:90:7, :, 0:20:3], "x": x[100:2900], "z": x[3] + 1}
    found = dict(prefetch(path, plan=plan))
    assert_equal(found, {name: tensor.contiguous() for name, tensor in expected.items()})


@pytest.mark.parametrize("slabs", [6, 0])
def test_a_load_without_a_limit_needs_nobody(large: Path, state: dict, slabs: int) -> None:
    reserve(slabs)
    before = allocated()
    # The current stream and the caller are busy.
    hold(0)
    loader = prefetch(large)
    assert eventually(lambda: accelerator.statistics()["to_device_bytes"] >= 12 * NBYTES)
    assert allocated() == before + 12 * NBYTES
    with no_waits():
        found = dict(loader)
    release(0)
    assert_equal(found, state)


@pytest.mark.parametrize("slabs", [6, 0])
def test_the_budget_limits_device_memory(large: Path, state: dict, slabs: int) -> None:
    reserve(slabs)
    accelerator.set_delay(0)
    before = allocated()
    for budget, ahead in ((4 * NBYTES, 4), (5 * NBYTES - 1, 4), (1, 1)):
        loader = prefetch(large, buffer_bytes=budget)
        assert settled() - before == ahead * NBYTES
        first = loader.take("t00")
        # The tensor that was handed out last counts.
        assert settled() - before == max(ahead, 2) * NBYTES
        second = loader.take("t01")
        assert settled() - before == (max(ahead, 2) + 1) * NBYTES
        del first, second
        loader.close()
        accelerator.synchronize()
        accelerator.empty_cache()
        assert allocated() == before


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
def test_a_loop_holds_no_more_than_the_budget(large: Path, state: dict, dtype: torch.dtype | None) -> None:
    reserve(6)
    accelerator.set_delay(0)
    before = allocated()
    accelerator.reset_statistics()
    for name, tensor in iterate(large, device(), dtype=dtype, buffer_bytes=16 * MIB):
        assert tensor.dtype == (dtype or torch.float32) and name in state
        del tensor
    peak = accelerator.statistics()["devices"][0]["peak"] - before
    # A tensor that was freed leaves the device when its stream has reached that point.
    assert peak <= 16 * MIB + (SLAB if dtype else 0) + 2 * NBYTES
    assert accelerator.statistics()["pinned_peak"] <= 6 * SLAB


def test_what_is_taken_by_name_goes_first(large: Path, state: dict) -> None:
    reserve(3)
    loader = prefetch(large, buffer_bytes=1)
    for name in ("t11", "t00", "t05"):
        assert_equal({name: loader.take(name)}, {name: state[name]})
    with pytest.raises(SafetensorError, match="'t05': already delivered"):
        loader.take("t05")
    assert {name for name, _ in loader} == set(state) - {"t11", "t00", "t05"}


@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_calls_waits_forever(path: Path, tensors: dict, seed: int) -> None:
    random_ = random.Random(seed)
    reserve(random_.choice([0, 2, 7]))
    safetensors_torch.set_transfer_options(threads=random_.choice([0, 1, 2, 5]))
    accelerator.set_delay(20, seed)
    loader = prefetch(path, buffer_bytes=random_.choice([1, 100, 3 * MIB, None]))
    items = iter(loader)
    found: dict[str, torch.Tensor] = {}
    while len(found) < len(tensors):
        left = sorted(set(tensors) - set(found))
        if random_.random() < 0.5:
            name = random_.choice(left)
            found[name] = loader.take(name)
        else:
            name, found[name] = next(items)
    assert next(items, None) is None
    assert_equal(found, tensors)


def test_threads_share_a_loader(path: Path, tensors: dict) -> None:
    reserve(4)
    loader = prefetch(path, buffer_bytes=4 * MIB)
    found: list[tuple[str, torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: found.extend(loader)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(tensors)
    assert_equal(dict(found), tensors)


def test_only_the_thread_of_the_loader_touches_the_device(path: Path, tensors: dict) -> None:
    reserve(8)
    safetensors_torch.set_transfer_options(threads=4)
    accelerator.reset_statistics()
    assert_equal(dict(prefetch(path, 1)), tensors, 1)
    assert accelerator.statistics()["threads"] <= 2


# --- streams


@pytest.fixture
def warm_pool() -> None:
    reserve(8)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_current_stream_sees_the_tensor(
    large: Path, state: dict, warm_pool: None, dtype: torch.dtype | None
) -> None:
    with held_pool():
        loader = iterate(large, device(), names=["t03"], dtype=dtype)
        with no_waits():
            ((name, loaded),) = loader
            seen = loaded.clone()
        # Nothing is copied yet: the clone is queued behind the copies.
        assert not accelerator.default_stream().query()
    assert torch.equal(seen.cpu(), state[name].to(seen.dtype))


def test_a_side_stream_can_be_the_current_one(large: Path, state: dict, warm_pool: None) -> None:
    stream = torch.Stream(device=device())
    loader = prefetch(large)
    with on_stream(stream):
        seen = {name: loader.take(name).clone() for name in ("t03", "t01")}
    stream.synchronize()
    assert_equal(seen, {name: state[name] for name in seen})


def test_queued_work_of_the_caller_keeps_its_memory(large: Path, state: dict, warm_pool: None) -> None:
    old = [torch.zeros(COUNT, device=device()) for _ in range(12)]
    accelerator.synchronize()
    hold(0)
    for tensor in old:
        tensor.fill_(5)
    del old, tensor
    found = dict(prefetch(large))
    time.sleep(0.05)  # work that does not wait is done by now
    release(0)
    assert_equal(found, state)


def test_memory_of_a_freed_tensor_is_not_reused_before_its_stream_is_done(
    large: Path, state: dict, warm_pool: None
) -> None:
    loader = prefetch(large, buffer_bytes=1)
    hold(0)
    seen = {name: tensor.clone() for name, tensor in loader}
    # Every copy has been made, each to memory that no queued clone reads.
    assert eventually(lambda: accelerator.statistics()["to_device_bytes"] >= 12 * NBYTES)
    time.sleep(0.05)
    release(0)
    assert_equal(seen, state)


def test_a_tensor_may_be_freed_before_its_copies_are_done(large: Path, state: dict, warm_pool: None) -> None:
    with held_pool():
        loader = prefetch(large, plan={"t00": None})
        loader.take("t00")  # dropped at once
        new = [torch.full((COUNT,), 9.0, device=device()) for _ in range(3)]
    accelerator.synchronize()
    assert all(torch.equal(tensor.cpu(), torch.full((COUNT,), 9.0)) for tensor in new)


def test_a_patched_program_may_use_any_stream(large: Path, state: dict, warm_pool: None) -> None:
    seen: list[torch.Tensor] = []

    def take() -> None:
        tensor = loader.take("t03")
        stream = torch.Stream(device=device())
        with on_stream(stream):
            seen.append(tensor.clone())
        stream.synchronize()

    with safetensors_torch.patch_safetensors(), safetensors.safe_open(large, "pt", device=str(device())) as file:
        loader = file.prefetch({"t03": None})
        with held_pool():
            thread = threading.Thread(target=take)
            thread.start()
            thread.join(0.2)
            assert thread.is_alive(), "the tensor was not copied yet"
        thread.join()
    assert_equal({"t03": seen[0]}, {"t03": state["t03"]})


# --- what ends it early


@pytest.mark.parametrize("slabs", [4, 0])
@pytest.mark.parametrize("how", ["close", "drop", "with"])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_an_end_half_way(large: Path, state: dict, tmp_path: Path, slabs: int, how: str, taken: int) -> None:
    reserve(slabs)
    with nothing_left(tmp_path):
        loader = prefetch(large, buffer_bytes=8 * MIB)
        found = {f"t{i:02}": loader.take(f"t{i:02}") for i in range(taken)}
        if how == "close":
            loader.close()
            loader.close()
            with pytest.raises(SafetensorError, match="closed"):
                loader.take("t11")
        elif how == "with":
            with loader:
                pass
        del loader
        assert_equal(found, {name: state[name] for name in found})
        del found


def test_an_end_does_not_wait_for_the_device(large: Path, tmp_path: Path) -> None:
    reserve(4)
    with nothing_left(tmp_path):
        loader = prefetch(large)
        with held_pool():
            time.sleep(0.1)
            start = time.monotonic()
            with no_waits():
                loader.close()
            assert time.monotonic() - start < 1
        del loader
        accelerator.synchronize()


def test_out_of_device_memory(large: Path, state: dict, tmp_path: Path) -> None:
    reserve(4)
    safetensors_torch.set_transfer_options(threads=1)
    accelerator.set_memory_limit(0, 20 * MIB)
    with nothing_left(tmp_path):
        loader = prefetch(large)
        with pytest.raises(torch.OutOfMemoryError, match=r"tensor 't06' of 3145728 bytes: .*out of memory"):
            list(loader)
        with pytest.raises(SafetensorError, match="closed"):
            loader.take("t07")
        accelerator.set_memory_limit(0, None)
        # A budget that the device has memory for does not fail.
        accelerator.empty_cache()
        accelerator.set_memory_limit(0, 20 * MIB)
        for name, tensor in prefetch(large, buffer_bytes=6 * MIB):
            assert torch.equal(tensor.cpu(), state[name])
            del tensor
        accelerator.set_memory_limit(0, None)


@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_a_copy_that_fails(large: Path, state: dict, tmp_path: Path, count: int) -> None:
    reserve(4)
    with nothing_left(tmp_path):
        accelerator.fail_copy_after(count)
        loader = prefetch(large)
        with pytest.raises(RuntimeError, match=r"tensor 't\d\d' cannot be copied to testaccel:0: .*injected"):
            dict(loader)
        assert_equal(dict(prefetch(large)), state)


@pytest.mark.parametrize("slabs", [4, 0])
def test_a_file_that_is_cut_short(large: Path, tmp_path: Path, slabs: int) -> None:
    reserve(slabs)
    with nothing_left(tmp_path):
        with safe_open(large, device=device(), backend="pread") as file:
            os.truncate(large, 30 * MIB)
            loader = file.prefetch()
        with pytest.raises(SafetensorError, match=r"large\.safetensors: the file became shorter.*tensor \"t(09|1\d)\""):
            dict(loader)
        del loader


def test_an_interrupt_ends_a_wait(large: Path, state: dict, tmp_path: Path) -> None:
    reserve(2)
    with nothing_left(tmp_path):
        loader = prefetch(large)
        loader.take("t00")
        with held_pool():
            with interrupted():
                loader.take("t11")
            with interrupted():
                dict(loader)
        loader.close()
        del loader
        accelerator.synchronize()
    assert_equal(dict(prefetch(large)), state)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_forked_process_has_no_thread(large: Path, state: dict, threads: int) -> None:
    reserve(4)
    safetensors_torch.set_transfer_options(threads=threads)
    loader = prefetch(large, buffer_bytes=6 * MIB)
    child = os.fork()
    if child == 0:
        refused = 0
        for attempt in (lambda: loader.take("t00"), lambda: next(iter(loader))):
            try:
                attempt()
            except SafetensorError as error:
                # The first failure closes the loader.
                refused += "before a fork" in str(error) or "closed" in str(error)
        loader.close()
        del loader
        os._exit(0 if refused == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert_equal(dict(loader), state)


def test_a_process_may_end_while_a_loader_runs(large: Path) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import accelerator; accelerator.load()\n"
        "import safetensors_torch\n"
        "loader = safetensors_torch.safe_open(sys.argv[1], device=accelerator.device()).prefetch(buffer_bytes=1)\n"
        "kept = loader.take('t03')\n"
        "cycle = [loader]; cycle.append(cycle)\n"
        "print('end')"
    )
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", program, str(large), str(here)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, "end\n"), ended.stderr
