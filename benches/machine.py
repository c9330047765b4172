"""The machine: what it is, the state of its page cache, and the memory of its processes.

Owns the dealings with /proc and with files that are not part of a timed run.
"""

from __future__ import annotations

import mmap
import os
import platform
import shutil
from pathlib import Path

_DROP = Path("/proc/sys/vm/drop_caches")
_BLOCK = 16 << 20


def describe(directory: Path) -> dict[str, str]:
    """What figures depend on, with the filesystem of `directory`."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "CPU": cpu or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{_field('/proc/meminfo', 'MemTotal') / 2**30:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "filesystem": _filesystem(directory),
        "transparent huge pages": huge.read_text().split("[")[1].split("]")[0] if huge.exists() else "none",
        "Python": platform.python_version(),
    }


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
    """Bytes that still fit on the filesystem of `directory`."""
    return shutil.disk_usage(directory).free


def can_drop_caches() -> bool:
    """Whether the page cache can be emptied."""
    return os.geteuid() == 0 and os.access(_DROP, os.W_OK)


def drop_caches() -> None:
    """Empties the page cache."""
    os.sync()
    _DROP.write_text("1")


def warm(path: Path) -> None:
    """Puts a file into the page cache, as one program that reads it through leaves it there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(descriptor, _BLOCK):
            pass
    finally:
        os.close(descriptor)


def back_memory(nbytes: int) -> None:
    """Has that much memory in use for a moment.

    A hypervisor that takes free memory away gives it back at the first touch, which takes longer than anything that is
    timed here: no run shall meet with that by chance. Huge pages, as those are what it takes.
    """
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, nbytes, mmap.PAGESIZE):
            memory[offset] = 1


def anonymous_bytes(pid: int) -> int:
    """The memory of a process that is neither of a file nor shared with one."""
    found = 0
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith(("RssAnon:", "RssShmem:")):
            found += int(line.split()[1]) << 10
    return found


def reset_peak(pid: int) -> int:
    """Lets the peak of a process's resident memory begin anew, and returns what it has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _field(f"/proc/{pid}/status", "VmRSS")


def peak(pid: int) -> int:
    """The most resident memory of a process, mapped files included, since `reset_peak`."""
    return _field(f"/proc/{pid}/status", "VmHWM")
