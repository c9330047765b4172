"""What Linux tells of this process's memory, for the tests of who pays for a load or a save.

Owns no test.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PAGE = 4096


def mapped_bytes(path: Path) -> int | None:
    """How many bytes of the mapping of ``path`` this process has page table entries for; None if it is not mapped."""
    found = None
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        if entry.split("\n", 1)[0].endswith(f" {path}"):
            found = (found or 0) + 1024 * int(re.search(r"^Rss:\s+(\d+) kB", entry, re.MULTILINE)[1])
    return found


def eventually(holds: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether ``holds`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@contextlib.contextmanager
def ctrl_c_is_heard() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt in the body, also in a process that was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def growth(setup: str, work: str) -> int:
    """By how many bytes the memory of a fresh Python has grown after it ran ``work`` after ``setup``."""
    program = """
import gc, pathlib, torch, safetensors_torch
def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
{setup}
gc.collect()
before = anonymous()
{work}
gc.collect()
print(anonymous() - before)
"""
    source = program.format(setup=textwrap.dedent(setup), work=textwrap.dedent(work))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def peak_growth(setup: str, work: str) -> int:
    """By how many bytes the memory of a fresh Python grows, at its peak, while it runs ``work`` after ``setup``.

    Memory of files, mapped ones among it, is the page cache's and does not count. A thread looks every millisecond; the
    native functions let it.
    """
    program = """
import gc, pathlib, threading, torch, safetensors_torch
def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
done = threading.Event()
seen = []
def look():
    while not done.wait(0.001):
        seen.append(anonymous())
{setup}
gc.collect()
before = anonymous()
thread = threading.Thread(target=look, daemon=True)
thread.start()
{work}
done.set()
thread.join()
print(max([*seen, anonymous()]) - before)
"""
    source = program.format(setup=textwrap.dedent(setup), work=textwrap.dedent(work))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
