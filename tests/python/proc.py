"""Measures of a process for the tests: mapped pages, growth of memory; and Ctrl-C."""

from __future__ import annotations

import contextlib
import re
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fresh import run_python

PAGE = 4096


def mapped_bytes(path: Path) -> int | None:
    """Returns the bytes of the mapping of ``path`` that have page table entries here, or None if it is not mapped."""
    found = None
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        if entry.split("\n", 1)[0].endswith(f" {path}"):
            found = (found or 0) + 1024 * int(re.search(r"^Rss:\s+(\d+) kB", entry, re.MULTILINE)[1])
    return found


def eventually(holds: Callable[[], bool], seconds: float = 20) -> bool:
    """Returns whether ``holds`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@contextlib.contextmanager
def ctrl_c_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt in the body, even if the process was started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_ANONYMOUS = """
import gc, pathlib, threading, torch, safetensors_torch
def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
"""


def growth(setup: str, work: str) -> int:
    """Returns by how many bytes the memory of a new process grows when it runs ``work`` after ``setup``."""
    program = f"""{_ANONYMOUS}
{textwrap.dedent(setup)}
gc.collect()
before = anonymous()
{textwrap.dedent(work)}
gc.collect()
print(anonymous() - before)
"""
    return _printed_number(program)


def peak_growth(setup: str, work: str) -> int:
    """Returns by how many bytes the memory of a new process grows, at its peak, while it runs ``work`` after ``setup``.

    Memory of files, mapped ones included, belongs to the page cache and does not count. A thread samples every
    millisecond, because the native functions release the GIL.
    """
    program = f"""{_ANONYMOUS}
done = threading.Event()
seen = []
def look():
    while not done.wait(0.001):
        seen.append(anonymous())
{textwrap.dedent(setup)}
gc.collect()
before = anonymous()
thread = threading.Thread(target=look, daemon=True)
thread.start()
{textwrap.dedent(work)}
done.set()
thread.join()
print(max([*seen, anonymous()]) - before)
"""
    return _printed_number(program)


def peak_resident_growth(setup: str, work: str) -> int:
    """Returns the same with the memory of mapped files, which is resident too."""
    program = f"""{_ANONYMOUS}
def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
{textwrap.dedent(setup)}
gc.collect()
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
before = resident("VmRSS:")
{textwrap.dedent(work)}
print(resident("VmHWM:") - before)
"""
    return _printed_number(program)


def _printed_number(program: str) -> int:
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
