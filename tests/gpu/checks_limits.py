"""Checks of the memory, threads and files of loads and saves, and of interrupts and errors."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import data
import machine
import safetensors_torch
from checking import MIB, POOL, SLAB, Setting, Wrong, check, demand, demand_same, numbers
from devices import limited_memory
from safetensors_torch import load, load_file, load_model, safe_open, save, save_file

# The growth of a process that many loads may cause: freed memory that the allocator keeps.
_SLACK = 16 * MIB
_FEW, _MANY = 10, 100


def _settled(measure: Callable[[], int], wanted: Callable[[int], bool], seconds: float = 10) -> int:
    """Returns the measure once it is as wanted, or when time is up."""
    deadline = time.monotonic() + seconds
    while not wanted(measure()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return measure()


@check("a model that is too large raises OutOfMemoryError with a name, and the next load works")
def out_of_memory(setting: Setting) -> None:
    device = setting.device
    tensors = {f"weights.{index}": numbers((8 * MIB,), seed=index) for index in range(8)}
    path = data.write(setting.path(), tensors)
    few = {name: tensors[name] for name in list(tensors)[:2]}
    load_file(path, device.torch, names=list(few))
    device.synchronize()
    device.empty_cache()
    before = device.allocated()
    for pool in (POOL, 0):
        safetensors_torch.set_transfer_options(pinned_pool_bytes=pool)
        with limited_memory(device, 100 * MIB):
            try:
                load_file(path, device.torch)
            except torch.OutOfMemoryError as error:
                text = str(error)
            else:
                raise Wrong("256 MiB were loaded into 100")
            demand(any(name in text for name in tensors), f"the error names no tensor: {text}")
            gc.collect()
            device.synchronize()
            demand(device.allocated() == before, f"{device.allocated() - before} bytes were left behind")
            demand_same(load_file(path, device.torch, names=list(few)), few, device.torch, "within the limit")
        demand_same(load_file(path, device.torch), tensors, device.torch, "without the limit")


class _Turn:
    """Calls everything that copies bytes to the device and back."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        tensors = {f"t.{index}": numbers((1 << 20,), seed=index) for index in range(6)}
        tensors.update((f"small.{index}", numbers((index,), seed=index)) for index in range(200))
        self._path = data.write(setting.path(), tensors)
        self._content = self._path.read_bytes()
        self._model = nn.Linear(1000, 1000).to(setting.device.torch)
        self._model_path = setting.path("linear")
        save_file(dict(self._model.state_dict()), self._model_path)

    def __call__(self) -> None:
        device = self._setting.device.torch
        loaded = load_file(self._path, device)
        load_file(self._path, device, dtype=torch.bfloat16)
        load(self._content, device)
        with safe_open(self._path, "pt", device) as file:
            file.get_slice("t.1")[::3]
        save_file(loaded, self._setting.path("saved"))
        save(loaded)
        load_model(self._model, self._model_path)


@check("nothing is left behind by 100 loads and saves")
def leaks(setting: Setting) -> dict[str, float]:
    device = setting.device
    safetensors_torch.reserve_transfer_memory(POOL)
    turn = _Turn(setting)
    measures: dict[str, Callable[[], int]] = {
        "bytes of tensors on the device": device.allocated,
        "pinned bytes": safetensors_torch.transfer_memory,
        "threads": machine.threads,
        "open files": machine.descriptors,
        "bytes of the process": lambda: machine.anonymous_bytes() - device.host_bytes(),
    }
    for _ in range(_FEW):
        turn()
    gc.collect()
    device.synchronize()
    time.sleep(0.5)  # threads may take a moment to end
    before = {what: measure() for what, measure in measures.items()}
    for _ in range(_MANY):
        turn()
    gc.collect()
    device.synchronize()
    for what, measure in measures.items():
        slack = _SLACK if what == "bytes of the process" else 0
        most = before[what] + slack
        now = _settled(measure, lambda value, most=most: value <= most)
        demand(now <= most, f"{what}: {before[what]} after {_FEW} turns, {now} after {_MANY} more")
    return {"leaked_host_bytes": machine.anonymous_bytes() - device.host_bytes() - before["bytes of the process"]}


class _Interrupt:
    """Sends Ctrl-C to this process after some time."""

    def __init__(self, seconds: float) -> None:
        # Shells may start background processes with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.sent = 0.0
        self._timer = threading.Timer(seconds, self._send)
        self._timer.start()

    def _send(self) -> None:
        self.sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    def join(self) -> None:
        self._timer.join()


def _interrupted(work: Callable[[], Any]) -> float:
    """Returns the seconds from the signal to the KeyboardInterrupt that ends the work."""
    interrupt = _Interrupt(0.5)
    try:
        work()
        interrupt.join()
        time.sleep(0.1)
    except KeyboardInterrupt:
        return time.monotonic() - interrupt.sent
    raise Wrong("no KeyboardInterrupt was raised")


@check("Ctrl-C ends a load and a save within a second, and nothing stays")
def interrupts(setting: Setting) -> dict[str, float]:
    device = setting.device
    # Larger than the pinned pool, so that a load has to wait for the device.
    tensors = {f"weights.{index}": numbers((8 * MIB,), seed=index) for index in range(5)}
    path = data.write(setting.path(), tensors)
    loaded = load_file(path, device.torch)
    save_file(loaded, setting.path("saved"))
    device.keep_busy(device.current_stream(), 0.1)  # measures its clock
    device.synchronize()
    before, files = device.allocated(), sorted(setting.directory.iterdir())
    slowest = 0.0
    for what, work in (
        ("load_file", lambda: load_file(path, device.torch)),
        ("load_file with dtype=", lambda: load_file(path, device.torch, dtype=torch.bfloat16)),
        ("save_file", lambda: save_file(loaded, setting.path("saved"))),
    ):
        device.keep_busy(device.current_stream(), 3)
        seconds = _interrupted(work)
        demand(device.is_busy(device.current_stream()), f"{what}: it ended with the work that it waited for")
        demand(seconds < 1, f"{what}: the interrupt took {seconds:.2f} s")
        slowest = max(slowest, seconds)
        gc.collect()
        device.synchronize()
        demand(device.allocated() == before, f"{what}: {device.allocated() - before} bytes were left on the device")
        demand(sorted(setting.directory.iterdir()) == files, f"{what}: files were left behind")
        pinned = safetensors_torch.transfer_memory()
        demand(pinned <= POOL, f"{what}: {pinned} bytes are pinned, more than the {POOL} that may be")
        demand_same(load_file(path, device.torch), tensors, device.torch, f"the load after {what}")
    return {"interrupt_seconds": slowest}


class _Enough(Exception):
    """Raised by a progress function."""


@check("progress is told, and what it raises ends a load and a save")
def progress(setting: Setting) -> None:
    device = setting.device
    path = data.write(setting.path(), {"t": numbers((20 * MIB,))})
    loaded = load_file(path, device.torch)
    device.synchronize()
    before = device.allocated()
    works: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("load_file", lambda tell: load_file(path, device.torch, progress=tell)),
        ("save_file", lambda tell: save_file(loaded, setting.path("saved"), progress=tell)),
    )
    for what, work in works:
        told: list[tuple[int, int]] = []
        work(lambda done, total, told=told: told.append((done, total)))
        demand(bool(told) and told[-1][0] == told[-1][1], f"{what}: the end was not told: {told[-3:]}")
        demand(told == sorted(told), f"{what}: it went back: {told}")

        def refuse(done: int, total: int) -> None:
            raise _Enough

        try:
            work(refuse)
        except _Enough:
            pass
        else:
            raise Wrong(f"{what}: what progress raised was lost")
        gc.collect()
        device.synchronize()
        demand(device.allocated() == before, f"{what}: bytes were left on the device")


def _large(setting: Setting) -> data.Tensors:
    """Returns tensors much larger than the memory of transfers."""
    pieces = 16
    count = setting.large // pieces // 4
    tensors = {f"weights.{index:02}": numbers((count - index,), seed=index) for index in range(pieces)}
    tensors.update((f"norms.{index:03}", numbers((1000 + index,), seed=index)) for index in range(100))
    return tensors


@check("a load takes no more of the device than its tensors and a slab")
def device_memory(setting: Setting) -> dict[str, float]:
    device = setting.device
    tensors = _large(setting)
    path = data.write(setting.path(), tensors)
    load_file(path, device.torch, names=["norms.000"])
    sizes = [tensor.nbytes for tensor in tensors.values()]
    del tensors
    found = {}
    for what, dtype in (("as it is", None), ("with dtype=", torch.float16)):
        for pool in (POOL, 0):
            safetensors_torch.set_transfer_options(pinned_pool_bytes=pool)
            device.synchronize()
            device.empty_cache()
            device.reset_peak()
            before = device.allocated()
            loaded = load_file(path, device.torch, dtype=dtype)
            device.synchronize()
            own, most = device.allocated() - before, device.peak() - before
            del loaded
            part = 1 if dtype is None else 2
            # Torch rounds up to 512 bytes, and may leave up to a MiB unused in large blocks.
            fitting = sum(-(-size // part // 512) * 512 + (MIB if size // part > MIB else 0) for size in sizes)
            demand(sum(sizes) // part <= own <= fitting, f"{what}: the tensors have {own / MIB:.1f} MiB")
            demand(most - own <= SLAB, f"{what}: {(most - own) / MIB:.2f} MiB more than the tensors")
            found[what] = max(found.get(what, 0), most - own)
    return {"load_device_bytes": found["as it is"], "converting_load_device_bytes": found["with dtype="]}


@check("loads and saves take less than 64 MiB of host memory beyond the pinned pool")
def host_memory(setting: Setting) -> dict[str, float]:
    device = setting.device
    path = data.write(setting.path(), _large(setting))
    gc.collect()
    found = {}

    def measure(what: str, work: Callable[[], Any], also: int = 0) -> Any:
        with machine.MemoryWatch(device.host_bytes) as watch:
            result = work()
            device.synchronize()
        found[what] = watch.growth
        demand(watch.growth - also < 64 * MIB, f"{what}: {watch.growth / MIB:.1f} MiB")
        return result

    # The driver decides whether pinned memory counts as memory of the process.
    measure("first_load_host_bytes", lambda: load_file(path, device.torch), POOL)
    safetensors_torch.reserve_transfer_memory(POOL)
    loaded = measure("load_host_bytes", lambda: load_file(path, device.torch))
    measure("pread_load_host_bytes", lambda: load_file(path, device.torch, backend="pread"))
    measure("converting_load_host_bytes", lambda: load_file(path, device.torch, dtype=torch.float16))
    measure("save_host_bytes", lambda: save_file(loaded, setting.path("saved")))
    safetensors_torch.set_transfer_options(pinned_pool_bytes=0)
    safetensors_torch.release_transfer_memory()
    measure("plain_load_host_bytes", lambda: load_file(path, device.torch))
    measure("plain_save_host_bytes", lambda: save_file(loaded, setting.path("saved")))
    return found


@check("the pinned pool grows to its limit, and can be released")
def pool(setting: Setting) -> None:
    device = setting.device
    small = data.write(setting.path("small"), {"t": numbers((MIB,))})
    large = data.write(setting.path("large"), {"t": numbers((40 * MIB,))})
    load_file(small, device.torch)
    pinned = safetensors_torch.transfer_memory()
    demand(pinned == 0, f"{pinned} bytes were pinned for a load of 4 MiB, which is not worth it")
    for most in (8 * MIB, 3 * SLAB, POOL):
        safetensors_torch.set_transfer_options(pinned_pool_bytes=most)
        load_file(large, device.torch)
        pinned = safetensors_torch.transfer_memory()
        demand(0 < pinned <= most, f"{pinned} bytes are pinned, where {most} may be")
    device.synchronize()
    safetensors_torch.release_transfer_memory()
    demand(safetensors_torch.transfer_memory() == 0, "something stayed pinned")
