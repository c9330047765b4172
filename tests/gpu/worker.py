"""A process in which one subject loads or saves one file several times.

Owns the clock, and the work between two runs. rivals.py lists the subjects, bench.py their order.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import devices
import machine
import processes
import rivals

# Runs are repeated for this many seconds, or this many times.
_SECONDS, _MOST = 4.0, 20


def _seconds(device: devices.Device, run: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a run until the device is idle, and its result."""
    gc.collect()
    device.synchronize()
    start = time.perf_counter()
    result = run()
    device.synchronize()
    return time.perf_counter() - start, result


def _repeat(device: devices.Device, run: Callable[[], Any], between: Callable[[], None]) -> list[float]:
    """Returns the seconds of the first run, of the second, and of some more."""
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds[2:]) < _SECONDS and len(seconds) < _MOST + 2):
        taken, result = _seconds(device, run)
        seconds.append(taken)
        del result
        between()
    return seconds


def _load(request: dict[str, Any], device: devices.Device) -> dict[str, Any]:
    subject = next(subject for subject in rivals.LOADS if subject.key == request["subject"])
    ready = rivals.prepare_load(subject, device.torch)
    path = request["path"]
    seconds = _repeat(device, lambda: ready.call(path), lambda: None)
    gc.collect()
    with machine.MemoryWatch(device.host_bytes) as watch:
        tensors, owner = ready.call(path)
        device.synchronize()
    names = data.names(Path(path))
    if sorted(tensors) != sorted(names):
        raise ValueError(f"{len(tensors)} tensors came out, not the {len(names)} of the file")
    elsewhere = next((tensor.device for tensor in tensors.values() if tensor.device != device.torch), None)
    if elsewhere is not None:
        raise ValueError(f"a tensor is on {elsewhere}, not on {device.torch}")
    checksum = data.checksum(tensors[name] for name in names)
    if checksum != request["checksum"]:
        raise ValueError("the tensors on the device are not those of the file")
    del tensors, owner
    return _answer(ready, seconds, watch)


def _save(request: dict[str, Any], device: devices.Device) -> dict[str, Any]:
    subject = next(subject for subject in rivals.SAVES if subject.key == request["subject"])
    ready = rivals.prepare_save(subject)
    tensors = {name: tensor.to(device.torch) for name, tensor in data.read(Path(request["path"]))}
    target = Path(request["target"])
    target.unlink(missing_ok=True)

    def clear() -> None:
        machine.flush(target)
        target.unlink()

    seconds = _repeat(device, lambda: ready.call(tensors, str(target)), clear)
    with machine.MemoryWatch(device.host_bytes) as watch:
        ready.call(tensors, str(target))
    saved, wanted = data.names(target), data.names(Path(request["path"]))
    if sorted(saved) != sorted(wanted):
        raise ValueError(f"{len(saved)} tensors were saved, not {len(wanted)}")
    found = data.checksum(tensor for _, tensor in data.read(target, wanted))
    clear()
    if found != request["checksum"]:
        raise ValueError("what was saved is not what was on the device")
    return _answer(ready, seconds, watch)


def _answer(ready: rivals.Ready, seconds: list[float], watch: machine.MemoryWatch) -> dict[str, Any]:
    return {
        "version": ready.version,
        "setup": ready.setup_seconds,
        "first": seconds[0],
        "second": seconds[1],
        "later": seconds[2:],
        "host_bytes": watch.growth,
    }


def _work(request: dict[str, Any]) -> dict[str, Any]:
    """Times one subject. Answers "missing" if it is not installed."""
    if request["prerelease"]:
        sys.path.insert(0, request["prerelease"])
    device = devices.open_device(request["device"])
    if isinstance(device, devices.Simulated):
        device.hurry()
    try:
        return (_load if request["work"] == "load" else _save)(request, device)
    except rivals.Missing as missing:
        return {"missing": str(missing)}


if __name__ == "__main__":
    processes.answer(_work)
