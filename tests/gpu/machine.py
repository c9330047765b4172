"""The machine: its description, its page cache, and the memory of processes. benches/ uses this module too, by a link.

Owns all reads of /proc, and what happens to files between timed runs.
"""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import platform
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PACKAGES = ("torch", "safetensors-torch", "safetensors", "fastsafetensors", "instanttensor", "runai-model-streamer")

_DROP = Path("/proc/sys/vm/drop_caches")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CHUNK = 16 << 20


def describe(directory: Path) -> dict[str, str]:
    """Returns what the figures depend on, with the filesystem of ``directory``."""
    names = (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return {
        "CPU": next(names, platform.machine()),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{_field('/proc/meminfo', 'MemTotal') / 2**30:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "filesystem": _filesystem(directory),
        "transparent huge pages": _HUGE_PAGES.read_text().split("[")[1].split("]")[0]
        if _HUGE_PAGES.exists()
        else "none",
        "Python": platform.python_version(),
    }


def packages() -> dict[str, str]:
    """Returns the versions of the installed packages among those that are compared."""
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
    """Returns a size of a file in /proc in bytes, or 0 if the kernel does not list it."""
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


def _huge_pages() -> str:
    return _HUGE_PAGES.read_text().split("[")[1].split("]")[0] if _HUGE_PAGES.exists() else "none"


def available_memory() -> int:
    """Returns how many bytes a program could allocate now."""
    return _field("/proc/meminfo", "MemAvailable")


def free_disk(directory: Path) -> int:
    """Returns how many bytes still fit on the filesystem of ``directory``."""
    return shutil.disk_usage(directory).free


def can_drop_caches() -> bool:
    """Returns whether this process may empty the page cache."""
    return os.geteuid() == 0 and os.access(_DROP, os.W_OK)


def drop_caches() -> None:
    """Empties the page cache."""
    os.sync()
    _DROP.write_text("1")


def flush(path: Path) -> None:
    """Waits until a file is on the disk, so that its writeback disturbs no timed run."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def warm(path: Path) -> None:
    """Reads a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(_CHUNK)
        while file.readinto(buffer):
            pass


def rewarm(path: Path) -> None:
    """Drops a file from the page cache and reads it again, so that the cache is as one sequential reader leaves it."""
    flush(path)  # dirty pages are not dropped
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    warm(path)


def back_memory(nbytes: int) -> None:
    """Touches that much memory and frees it.

    A hypervisor that reclaims free memory returns it at the first touch, which takes longer than anything that is
    timed here. Huge pages, because those are what it reclaims.
    """
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, nbytes, mmap.PAGESIZE):
            memory[offset] = 1


def anonymous_bytes(process: int | str = "self") -> int:
    """Returns the resident memory of a process without that of mapped files."""
    path = f"/proc/{process}/status"
    return _field(path, "RssAnon") + _field(path, "RssShmem")


def reset_peak(process: int) -> int:
    """Resets the peak of a process's resident memory, and returns its resident memory now."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return _field(f"/proc/{process}/status", "VmRSS")


def peak(process: int) -> int:
    """Returns the peak of a process's resident memory since `reset_peak`, with that of mapped files."""
    return _field(f"/proc/{process}/status", "VmHWM")


def threads() -> int:
    """Returns the number of threads of this process."""
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    """Returns the number of open files of this process."""
    return len(os.listdir("/proc/self/fd"))


class MemoryWatch:
    """Samples the anonymous memory of this process every millisecond while a block runs.

    Args:
        excluded: returns the bytes that do not count; called with each sample.
    """

    def __init__(self, excluded: Callable[[], int]) -> None:
        self._excluded = excluded
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._before = 0
        self._peak = 0
        self._error: Exception | None = None

    @property
    def growth(self) -> int:
        """How many bytes above its start the memory was at its peak."""
        return max(0, self._peak - self._before)

    def _now(self) -> int:
        return anonymous_bytes() - self._excluded()

    def __enter__(self) -> MemoryWatch:
        self._before = self._peak = self._now()
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
            self._peak = max(self._peak, self._now())

    def _sample(self) -> None:
        try:
            while not self._done.wait(0.001):
                self._peak = max(self._peak, self._now())
        except Exception as error:  # raised where the block ends
            self._error = error
