"""The test accelerator itself: a program that does not wait gets wrong data, and one that waits gets its data.

Tests hold streams to fix an order, so that no test depends on timing.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import accelerator
from accelerator import default_stream, device, hold, hold_stream, release, release_stream, statistics

HERE = Path(__file__).resolve().parent
DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")
    },
    key=str,
)
OLD, NEW = 1.0, 2.0
COUNT = 1000


def pinned(value: float) -> torch.Tensor:
    return torch.full((COUNT,), value, pin_memory=True)


def side_stream(index: int = 0) -> torch.Stream:
    return torch.Stream(device=device(index))


def holds(tensor: torch.Tensor, value: float) -> bool:
    return torch.equal(tensor.cpu(), torch.full(tensor.shape, value))


# Wrong without a wait, right with it.


def test_a_pinned_source_is_read_late() -> None:
    host = pinned(OLD)
    hold(0)
    copy = host.to(device(), non_blocking=True)
    host.fill_(NEW)
    release(0)
    assert holds(copy, NEW)


def test_a_pinned_source_that_waits_for_an_event_is_safe() -> None:
    host = pinned(OLD)
    copy = host.to(device(), non_blocking=True)
    event = default_stream().record_event()
    event.synchronize()
    host.fill_(NEW)
    assert holds(copy, OLD)


def test_a_freed_pinned_source_is_overwritten() -> None:
    host = pinned(OLD)
    hold(0)
    copy = host.to(device(), non_blocking=True)
    address = host.data_ptr()
    del host
    assert pinned(NEW).data_ptr() == address
    release(0)
    assert not holds(copy, OLD)


def test_a_pinned_destination_is_written_late() -> None:
    source = torch.full((COUNT,), NEW, device=device())
    host = pinned(OLD)
    hold(0)
    host.copy_(source, non_blocking=True)
    assert holds(host, OLD)
    release(0)
    default_stream().synchronize()
    assert holds(host, NEW)


@pytest.mark.parametrize("non_blocking", [False, True])
def test_a_pageable_copy_waits(non_blocking: bool) -> None:
    host = torch.full((COUNT,), OLD)
    copy = host.to(device(), non_blocking=non_blocking)
    host.fill_(NEW)
    back = torch.empty(COUNT).copy_(copy, non_blocking=non_blocking)
    assert holds(back, OLD)
    assert statistics()["blocking_copies"] == 2


@pytest.mark.parametrize("waits", [False, True])
def test_another_stream_sees_a_copy_once_it_waits(waits: bool) -> None:
    target = torch.full((COUNT,), OLD, device=device())
    accelerator.synchronize()
    side, host = side_stream(), pinned(NEW)
    hold_stream(side)
    with accelerator.on_stream(side):
        target.copy_(host, non_blocking=True)
    if waits:
        default_stream().wait_stream(side)
    seen = target.clone()
    if not waits:
        default_stream().synchronize()
    release_stream(side)
    assert holds(seen, NEW if waits else OLD)


@pytest.mark.parametrize("waits", [False, True])
def test_reused_memory_still_has_writes_queued(waits: bool) -> None:
    hold(0)
    before = torch.full((COUNT,), OLD, device=device())
    address = before.data_ptr()
    del before
    after = torch.empty(COUNT, device=device())
    assert after.data_ptr() == address
    side, host = side_stream(), pinned(NEW)
    if waits:
        side.wait_stream(default_stream())
    with accelerator.on_stream(side):
        after.copy_(host, non_blocking=True)
    if not waits:
        side.synchronize()
    release(0)
    accelerator.synchronize()
    assert holds(after, NEW if waits else OLD)


@pytest.mark.parametrize("waits", [False, True])
def test_random_delays_find_a_wait_that_is_missing(waits: bool) -> None:
    accelerator.set_delay(2000, seed=3)
    side, host = side_stream(), pinned(0)
    late = 0
    for value in range(20):
        host.fill_(value)
        with accelerator.on_stream(side):
            copy = host.to(device(), non_blocking=True)
        if waits:
            default_stream().wait_stream(side)
        late += not holds(copy, value)
        side.synchronize()
    assert late == 0 if waits else late > 0


# Streams and events.


def test_an_event_stands_for_its_last_record_but_waits_for_the_one_before() -> None:
    first, second, third = side_stream(), side_stream(), side_stream()
    hold_stream(first)
    event = torch.Event(device=device())
    assert event.query()
    event.record(first)
    third.wait_event(event)
    event.record(second)
    event.synchronize()
    assert event.query() and not third.query()
    release_stream(first)
    third.synchronize()
    assert third.query()


def test_a_destroyed_event_is_still_waited_for() -> None:
    first, second = side_stream(), side_stream()
    hold_stream(first)
    event = first.record_event()
    second.wait_event(event)
    del event
    assert statistics()["live_events"] == 0 and not second.query()
    release_stream(first)
    second.synchronize()


def test_an_event_belongs_to_a_device() -> None:
    event = side_stream(0).record_event()
    with pytest.raises(RuntimeError, match="Event device index 0 does not match .* index 1"):
        event.record(side_stream(1))
    side_stream(1).wait_event(event)
    assert statistics()["live_events"] == 1


def test_streams_come_from_a_pool_and_are_current_in_one_thread() -> None:
    ids = [side_stream().stream_id for _ in range(8)]
    assert sorted(ids[:4]) == [1, 2, 3, 4] and ids[4:] == ids[:4]
    seen = []
    with accelerator.on_stream(side_stream(1)) as stream:
        assert torch.accelerator.current_stream() == stream
        assert torch.empty(1, device=accelerator.NAME).device == device(1)
        thread = threading.Thread(target=lambda: seen.append(torch.accelerator.current_stream()))
        thread.start()
        thread.join()
    assert seen == [default_stream(0)] and torch.accelerator.current_stream() == default_stream(0)


def test_a_held_stream_does_not_stop_the_host() -> None:
    hold(0)
    tensor = torch.zeros(COUNT, device=device())
    tensor.copy_(pinned(NEW), non_blocking=True)
    default_stream(1).wait_stream(default_stream(0))
    assert not default_stream(0).query() and not default_stream(1).query()
    accelerator.set_patience(0.05)
    with pytest.raises(RuntimeError, match="the host waited for 0.05 s.*held"):
        tensor.cpu()
    release(0)


def test_work_that_fails_is_reported_by_the_next_wait() -> None:
    tensor = torch.zeros(4, dtype=torch.bits8, device=device())
    tensor.fill_(1)
    with pytest.raises(RuntimeError, match="a task failed: .*fill"):
        default_stream().synchronize()
    default_stream().synchronize()


# Memory.


def test_memory_is_reused_by_its_stream_alone() -> None:
    addresses = []
    for stream in (default_stream(), side_stream(), default_stream()):
        with accelerator.on_stream(stream):
            addresses.append(torch.empty(100, device=device()).data_ptr())
    assert addresses[0] == addresses[2] != addresses[1]


def test_memory_recorded_on_a_stream_is_held_back_until_that_is_done() -> None:
    side = side_stream()
    hold_stream(side)
    tensor = torch.zeros(COUNT, device=device())
    address = tensor.data_ptr()
    with accelerator.on_stream(side):
        tensor.clone()
    tensor.record_stream(side)
    del tensor
    assert torch.empty(COUNT, device=device()).data_ptr() != address
    release_stream(side)
    side.synchronize()
    found = [torch.empty(COUNT, device=device()) for _ in range(2)]
    assert address in [tensor.data_ptr() for tensor in found]


def test_memory_has_a_limit_that_cached_memory_does_not_count_against() -> None:
    mib = 1 << 20
    accelerator.set_memory_limit(0, 4 * mib)
    tensor = torch.empty(3 * mib, dtype=torch.uint8, device=device())
    with pytest.raises(torch.OutOfMemoryError, match="testaccel out of memory. Tried to allocate 2.00 MiB. Device 0"):
        torch.empty(2 * mib, dtype=torch.uint8, device=device())
    torch.empty(2 * mib, dtype=torch.uint8, device=device(1))
    del tensor
    assert torch.empty(4 * mib, dtype=torch.uint8, device=device()).numel() == 4 * mib


def test_memory_is_counted() -> None:
    kept = torch.empty(100, dtype=torch.uint8, device=device())
    torch.empty(1000, dtype=torch.uint8, device=device())
    first, second = statistics()["devices"]
    assert first == {"allocated": 512, "peak": 1536, "reserved": 1536, "allocations": 2}
    assert second == {"allocated": 0, "peak": 0, "reserved": 0, "allocations": 0}
    accelerator.empty_cache()
    accelerator.reset_statistics()
    assert statistics()["devices"][0] == {"allocated": 512, "peak": 512, "reserved": 512, "allocations": 0}
    del kept


def test_fresh_memory_is_not_zero() -> None:
    assert torch.empty(COUNT, dtype=torch.uint8, device=device()).cpu().unique().tolist() == [0xDB]


def test_the_host_cannot_read_a_device() -> None:
    script = f"""
import ctypes, sys
sys.path.insert(0, {str(HERE)!r})
import accelerator, torch
accelerator.load()
ctypes.string_at(torch.zeros(3, device="testaccel").data_ptr(), 1)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -11


def test_pinned_memory() -> None:
    tensor = torch.empty(300, dtype=torch.uint8, pin_memory=True)
    assert tensor.is_pinned() and tensor[299:].is_pinned() and torch.ones(3).pin_memory().is_pinned()
    assert not torch.empty(300).is_pinned()
    counts = statistics()
    assert counts["pinned_in_use"] == 512 and counts["pinned_peak"] == 528 and counts["pinned_total"] == 528
    del tensor
    assert statistics()["pinned_in_use"] == 0
    again = torch.empty(500, dtype=torch.uint8, pin_memory=True)
    assert statistics()["pinned_total"] == 528
    del again
    accelerator.empty_cache()
    assert statistics()["pinned_total"] == 0


def test_pinning_takes_its_time_when_asked() -> None:
    accelerator.pinning_cost(20_000)
    start = time.monotonic()
    kept = [torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    assert time.monotonic() - start >= 0.04
    del kept


# Faults.


def test_a_copy_fails_when_asked() -> None:
    accelerator.fail_copy_after(3)
    tensor = torch.zeros(3).to(device())
    tensor.cpu()
    with pytest.raises(RuntimeError, match="^testaccel: injected copy failure$"):
        tensor.cpu()
    assert holds(tensor, 0)


def test_pinning_fails_when_asked() -> None:
    accelerator.fail_pinning(True)
    with pytest.raises(RuntimeError, match="^testaccel: injected pinning failure$"):
        torch.empty(3, pin_memory=True)


def test_streams_are_missing_when_asked() -> None:
    accelerator.no_streams(True)
    with pytest.raises(RuntimeError, match="^Backend doesn't support create a new Stream.$"):
        side_stream()
    with pytest.raises(RuntimeError, match="^Backend doesn't support events.$"):
        torch.Event(device=device()).record()
    assert holds(torch.ones(3, device=device()), 1)


def test_waits_and_threads_are_counted() -> None:
    event = default_stream().record_event()
    event.synchronize()
    default_stream().synchronize()
    accelerator.synchronize(0)
    thread = threading.Thread(target=lambda: torch.empty(1, device=device(1)))
    thread.start()
    thread.join()
    counts = statistics()
    assert [counts[f"{kind}_waits"] for kind in ("event", "stream", "device")] == [1, 1, 1]
    assert counts["threads"] == 1
    torch.empty(1, device=device(1))
    assert statistics()["threads"] == 2


# Operations on tensors.


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_goes_there_and_back(dtype: torch.dtype) -> None:
    raw = torch.arange(160, dtype=torch.uint8) % (2 if dtype is torch.bool else 251)
    there = raw.view(dtype).to(device())
    assert there.dtype == dtype
    for tensor in (there, there.clone(), there.to(device(1))):
        assert torch.equal(tensor.cpu().view(torch.uint8), raw)
    assert torch.zeros(4, dtype=torch.uint8).equal(torch.zeros(4, device=device()).to(torch.uint8).cpu())


def test_tensors_of_every_layout_are_copied() -> None:
    host = torch.arange(24.0).reshape(4, 6)
    there = host.to(device())
    assert torch.equal(there.t().cpu(), host.t())
    assert torch.equal(there[1:3, ::2].cpu(), host[1:3, ::2])
    assert torch.equal(there[:, 1].double().cpu(), host[:, 1].double())
    assert torch.equal(there.view(3, 8).view(torch.int32).cpu(), host.view(3, 8).view(torch.int32))
    there[1:3] = host[:2].t().contiguous().t().double()
    assert torch.equal(there[1:3].cpu(), host[:2])
    assert torch.equal(torch.empty(6, 4, dtype=torch.int64).copy_(there.t()), there.cpu().t().long())
    assert torch.equal(torch.cat([there, there]).add_(1).cpu(), torch.cat([there.cpu()] * 2) + 1)
    assert torch.equal(there, there.clone()) and there[0, 3].item() == 3
    conj = torch.tensor([1 + 2j]).to(device()).conj()
    assert conj.cpu().item() == 1 - 2j and conj.imag.cpu().item() == -2
    assert there.detach().resize_(2, 3).shape == (2, 3) and torch.empty(0, 3, device=device()).cpu().shape == (0, 3)


def test_devices_are_apart() -> None:
    one = torch.ones(5, device=device(0))
    other = one.to(device(1))
    assert other.device == device(1) and other.untyped_storage().device == device(1)
    accelerator.synchronize()
    hold(0)
    one.fill_(3)
    assert holds(other, 1)
    after = one.to(device(1), torch.float64)
    release(0)
    assert torch.equal(after.cpu(), torch.full((5,), 3.0, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="there is no device 2"):
        torch.empty(1, device=device(2))


def test_a_module_moves_and_its_state_returns() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=torch.float32)).eval()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    data = torch.arange(6.0).reshape(2, 3)
    expected = module(data)
    module.to(device(1))
    assert {tensor.device for tensor in module.state_dict().values()} == {device(1)}
    assert torch.allclose(module(data.to(device(1))).cpu(), expected)
    for tensor in module.state_dict().values():
        tensor.zero_()
    module.load_state_dict(state)
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in module.state_dict().items())


def test_a_process_ends_with_work_queued() -> None:
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import accelerator, torch
accelerator.load()
accelerator.load()
accelerator.set_delay(100_000_000)
tensor = torch.zeros(3, device="testaccel:0")
accelerator.hold(1)
other = torch.zeros(3, device="testaccel:1")
torch.Stream(device="testaccel:0").wait_stream(torch.accelerator.current_stream())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
