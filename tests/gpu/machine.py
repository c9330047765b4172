"""The machine: what it is, its page cache, and the memory of a process.

Owns the dealings with /proc and with files that are not part of a timed run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PACKAGES = ("torch", "safetensors-torch", "safetensors", "fastsafetensors", "instanttensor", "runai-model-streamer")

_BLOCK = 16 << 20


def describe(directory: Path) -> dict[str, str]:
    """What figures depend on, with the filesystem of ``directory``."""
    names = (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return {
        "CPU": next(names, platform.machine()),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{_field('/proc/meminfo', 'MemTotal') / 2**30:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "filesystem": _filesystem(directory),
        "Python": platform.python_version(),
    }


def packages() -> dict[str, str]:
    """The versions of what is compared, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _field(path: str, name: str) -> int:
    """A size in /proc, in bytes; 0 where the kernel does not tell it."""
    for line in _lines(path):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def _filesystem(directory: Path) -> str:
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in _lines("/proc/self/mountinfo"):
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def available_memory() -> int:
    """Bytes that a program could have now."""
    return _field("/proc/meminfo", "MemAvailable")


def free_disk(directory: Path) -> int:
    """Bytes that still fit on the filesystem of ``directory``."""
    return shutil.disk_usage(directory).free


def flush(path: Path) -> None:
    """Waits until a file is on the disk, so that writing it disturbs nothing that is timed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def warm(path: Path) -> None:
    """Reads a file, so that it is in the page cache."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(_BLOCK)
        while file.readinto(buffer):
            pass


def anonymous_bytes() -> int:
    """The memory of this process that is neither of a file nor the page cache's."""
    found = 0
    for line in _lines("/proc/self/status"):
        if line.startswith(("RssAnon:", "RssShmem:")):
            found += int(line.split()[1]) << 10
    return found


def threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


class Watch:
    """Looks every millisecond how much anonymous memory this process has, while a block runs.

    Args:
        less: bytes that do not count, asked for with each look.
    """

    def __init__(self, less: Callable[[], int]) -> None:
        self._less = less
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._before = 0
        self._most = 0
        self._error: Exception | None = None

    @property
    def growth(self) -> int:
        """How many bytes more than before the block there were at the most."""
        return max(0, self._most - self._before)

    def _now(self) -> int:
        return anonymous_bytes() - self._less()

    def __enter__(self) -> Watch:
        self._before = self._most = self._now()
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        if exc is None:
            if self._error is not None:
                raise self._error
            self._most = max(self._most, self._now())

    def _look(self) -> None:
        try:
            while not self._done.wait(0.001):
                self._most = max(self._most, self._now())
        except Exception as error:  # raised where the block ends
            self._error = error
