"""Checks of the order of work on a device: loads and saves wait for what they must, and for nothing else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import torch
from torch import nn

import data
import safetensors_torch
from checking import MIB, POOL, Setting, Skip, check, demand, demand_same, numbers, same_bits
from safetensors_torch import load_file, load_model, save, save_file

# How many seconds streams are kept busy: much longer than the checked call takes.
_BUSY = 2.0
_COUNT = 1 << 20


def _tensors() -> data.Tensors:
    """Returns 24 MiB of tensors, which fit in the pinned pool."""
    return {f"weights.{index}": numbers((_COUNT,), seed=index) for index in range(6)}


def _warm_up(setting: Setting) -> data.Tensors:
    """Writes the file, runs all one-time setup, and returns the tensors of the file."""
    tensors = _tensors()
    path = data.write(setting.path(), tensors)
    safetensors_torch.set_transfer_options(pinned_pool_bytes=POOL)
    demand(safetensors_torch.reserve_transfer_memory(POOL) == POOL, "the pinned pool could not be reserved")
    for _ in range(2):
        loaded = load_file(path, setting.device.torch)
        save(loaded)
        del loaded
    # This measures the clock of `keep_busy` and loads the kernel that fills memory.
    torch.full((_COUNT,), 7.0, device=setting.device.torch)
    setting.device.keep_busy(setting.device.current_stream(), 0.1)
    setting.device.synchronize()
    return tensors


@contextlib.contextmanager
def _stream(setting: Setting, side: bool) -> Iterator[str]:
    """Makes a new stream the current one, or keeps the default stream."""
    if not side:
        yield "the default stream"
        return
    stream = setting.device.new_stream()
    stream.wait_stream(setting.device.current_stream())
    with setting.device.on(stream):
        yield "a side stream"
    setting.device.synchronize()


def _both(setting: Setting) -> Iterator[str]:
    for side in (False, True):
        with _stream(setting, side) as what:
            yield what


@check("data that was loaded is right for the work that is queued next")
def used_at_once(setting: Setting) -> None:
    tensors = _warm_up(setting)
    for pool in (POOL, 0):
        safetensors_torch.set_transfer_options(pinned_pool_bytes=pool)
        for what in _both(setting):
            for _ in range(10):
                loaded = load_file(setting.path(), setting.device.torch)
                doubled = {name: tensor * 2 for name, tensor in loaded.items()}
                expected = {name: tensor * 2 for name, tensor in tensors.items()}
                demand_same(doubled, expected, setting.device.torch, f"{what}, pool of {pool // MIB} MiB")
                # The next load reuses this memory while it is still being read.
                copies = {name: tensor.clone() for name, tensor in loaded.items()}
                del loaded
                again = load_file(setting.path(), setting.device.torch, dtype=torch.float64)
                demand_same(copies, tensors, setting.device.torch, f"{what}, copied and freed")
                demand_same(
                    again,
                    {name: tensor.double() for name, tensor in tensors.items()},
                    setting.device.torch,
                    f"{what}, into memory that was just freed",
                )


@check("work that is queued after a load waits for copies that are late")
def late_copies(setting: Setting) -> None:
    tensors, device = _warm_up(setting), setting.device
    for what in _both(setting):
        load_file(setting.path(), device.torch)  # allocates memory of this stream
        device.synchronize()
        # The copies come after this, on any stream.
        device.keep_others_busy(_BUSY / 4)
        start = time.monotonic()
        loaded = load_file(setting.path(), device.torch)
        demand(
            time.monotonic() - start < _BUSY / 4,
            f"{what}: the load waited for copies that fit in the pool",
        )
        copies = {name: loaded[name].clone() for name in reversed(list(loaded))}
        demand_same(copies, tensors, device.torch, what)


@check("memory that pending work still writes to is not loaded into too early")
def reused_memory(setting: Setting) -> None:
    tensors, device = _warm_up(setting), setting.device
    reused = 0
    for what in _both(setting):
        device.empty_cache()
        victims = [torch.zeros(_COUNT, device=device.torch) for _ in tensors]
        freed = {victim.data_ptr() for victim in victims}
        device.synchronize()
        device.keep_busy(device.current_stream(), _BUSY)
        for victim in victims:
            victim.fill_(7)
        del victim, victims
        if not device.is_busy(device.current_stream()):
            raise Skip("the device could not be kept busy")
        start = time.monotonic()
        loaded = load_file(setting.path(), device.torch)
        seconds = time.monotonic() - start
        reused += sum(tensor.data_ptr() in freed for tensor in loaded.values())
        demand(seconds < _BUSY / 2, f"{what}: the load waited for the device, {seconds:.2f} s")
        demand_same({name: tensor.clone() for name, tensor in loaded.items()}, tensors, device.torch, what)
        del loaded
    if reused == 0:
        raise Skip("torch gave other memory each time")


@check("a load and a save do not wait for another stream")
def held_up_by_nobody(setting: Setting) -> None:
    tensors, device = _warm_up(setting), setting.device
    source = load_file(setting.path(), device.torch)
    expected = save(tensors)
    device.synchronize()
    for work in ("load", "save"):
        other = device.new_stream()
        device.keep_busy(other, _BUSY)
        start = time.monotonic()
        if work == "load":
            loaded = load_file(setting.path(), device.torch)
            right = all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
        else:
            right = save(source) == expected
        seconds = time.monotonic() - start
        demand(right, f"{work}: other data")
        demand(device.is_busy(other), f"{work}: it waited for the other stream, {seconds:.2f} s")
        demand(seconds < _BUSY / 2, f"{work}: it took {seconds:.2f} s, though no work of its own was pending")
        device.synchronize()


@check("a save has what the current stream was still to compute")
def saved_after_pending_work(setting: Setting) -> None:
    _warm_up(setting)
    device = setting.device
    for pool in (POOL, 0):
        safetensors_torch.set_transfer_options(pinned_pool_bytes=pool)
        for number, what in enumerate(_both(setting)):
            tensor = torch.zeros(_COUNT + 3, device=device.torch)
            device.synchronize()
            device.keep_busy(device.current_stream(), _BUSY / 4)
            tensor.fill_(number + 3)
            expected = {"t": torch.full((_COUNT + 3,), float(number + 3))}
            save_file({"t": tensor}, setting.path("saved"))
            demand(same_bits(dict(data.read(setting.path("saved")))["t"], expected["t"]), f"{what}, pool of {pool}")


@check("a model is filled after what its stream was still to do with it")
def model_after_pending_work(setting: Setting) -> None:
    _warm_up(setting)
    device = setting.device
    source = nn.Linear(1000, 1001)
    data.write(setting.path("linear"), {"weight": source.weight, "bias": source.bias})
    for what in _both(setting):
        model = nn.Linear(1000, 1001).to(device.torch)
        device.synchronize()
        device.keep_busy(device.current_stream(), _BUSY / 4)
        with torch.no_grad():
            model.weight.fill_(7)
            model.bias.fill_(7)
        load_model(model, setting.path("linear"))
        # On the same stream, so that only the load can be late.
        found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        demand_same(found, dict(source.state_dict()), device.torch, what)


@check("threads load and save at the same time, each on a stream of its own")
def threads(setting: Setting) -> None:
    tensors, device = _warm_up(setting), setting.device
    expected = save(tensors)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with device.on(device.new_stream()):
                for turn in range(5):
                    loaded = load_file(setting.path(), device.torch)
                    demand_same(loaded, tensors, device.torch, f"thread {number}, turn {turn}")
                    demand(save(loaded) == expected, f"thread {number}, turn {turn}: other bytes were saved")
        except BaseException as error:  # raised again in the waiting thread
            failures.append(error)

    workers = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    pinned = safetensors_torch.transfer_memory()
    demand(pinned <= POOL, f"{pinned} bytes are pinned, more than the {POOL} that may be")
