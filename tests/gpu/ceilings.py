"""The limits of the machine: copies over the bus, reads from the page cache and writes to it.

Owns only these measurements. They use torch and not the library.
"""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import devices
import machine
import processes

_MIB = 1 << 20
_BUFFER = 256 * _MIB
_COPIES = 16
_CHUNK = 2 * _MIB
_THREADS = (1, 2, 4, 8)
_TIMES = 3
# Reads and writes stop here: more bytes show nothing more.
_MOST = 4 << 30
_PINNED = (2, 16, 64, 256)  # MiB


def _best(nbytes: int, work: Callable[[], None]) -> float:
    """Returns the bytes per second of the best of some runs, after a warm-up."""
    seconds = []
    for _ in range(_TIMES + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return nbytes / min(seconds[1:])


def _copies(device: devices.Device) -> dict[str, float]:
    there = torch.zeros(_BUFFER, dtype=torch.uint8, device=device.torch)
    pinned = torch.zeros(_BUFFER, dtype=torch.uint8, pin_memory=True)
    pageable = torch.zeros(_BUFFER, dtype=torch.uint8)

    def repeat(target: torch.Tensor, source: torch.Tensor) -> float:
        def work() -> None:
            for _ in range(_COPIES):
                target.copy_(source, non_blocking=True)
            device.synchronize()

        return _best(_COPIES * _BUFFER, work)

    return {
        "pinned to device": repeat(there, pinned),
        "pinned from device": repeat(pinned, there),
        "pageable to device": repeat(there, pageable),
        "pageable from device": repeat(pageable, there),
    }


def _pinning() -> dict[str, float]:
    """Returns the seconds to pin a MiB, by the MiB that one call pins."""
    found = {}
    kept = []
    for size in _PINNED:
        seconds = []
        for _ in range(_TIMES):
            start = time.perf_counter()
            # Kept, because torch would reuse freed memory.
            kept.append(torch.empty(size * _MIB, dtype=torch.uint8, pin_memory=True))
            seconds.append(time.perf_counter() - start)
        found[str(size)] = statistics.median(seconds) / size
    return found


def _reads(path: Path) -> dict[str, float]:
    """Returns the bytes per second read from the page cache, by the number of threads."""
    nbytes = min(path.stat().st_size, _MOST)
    machine.warm(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return {str(count): _best(nbytes, lambda count=count: _read(descriptor, nbytes, count)) for count in _THREADS}
    finally:
        os.close(descriptor)


# One for each thread, touched already.
_buffers = [mmap.mmap(-1, _CHUNK) for _ in range(max(_THREADS))]


def _read(descriptor: int, nbytes: int, threads: int) -> None:
    for buffer in _buffers:
        buffer[:: mmap.PAGESIZE] = bytes(len(range(0, _CHUNK, mmap.PAGESIZE)))
    chunks = itertools.count()
    failures: list[BaseException] = []

    def work(buffer: mmap.mmap) -> None:
        try:
            for chunk in chunks:
                if chunk * _CHUNK >= nbytes:
                    return
                os.preadv(descriptor, [buffer], chunk * _CHUNK)
        except BaseException as error:  # raised again in the waiting thread
            failures.append(error)

    workers = [threading.Thread(target=work, args=[buffer]) for buffer in _buffers[:threads]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def _writes(directory: Path, nbytes: int) -> float:
    """Returns the bytes per second that one thread writes to a new, preallocated file in the page cache."""
    nbytes = min(nbytes, _MOST)
    content = bytes(_CHUNK)
    target = directory / "ceiling"
    seconds = []
    for _ in range(_TIMES):
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            start = time.perf_counter()
            os.posix_fallocate(descriptor, 0, nbytes)
            for offset in range(0, nbytes, _CHUNK):
                os.pwrite(descriptor, content[: nbytes - offset], offset)
            seconds.append(time.perf_counter() - start)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            target.unlink()
    return nbytes / min(seconds)


def _work(request: dict[str, Any]) -> dict[str, Any]:
    device = devices.open_device(request["device"])
    if isinstance(device, devices.Simulated):
        device.hurry()
    path = Path(request["path"])
    return {
        "copies": _copies(device),
        "pinning": _pinning(),
        "reads": _reads(path),
        "write": _writes(path.parent, path.stat().st_size),
    }


if __name__ == "__main__":
    processes.answer(_work)
