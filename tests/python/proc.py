"""Processes for the tests: programs in processes of their own, memory, and Ctrl-C."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


# Imports torch and the package, then runs each program that it reads, as a line of JSON, in a child of its own. Prints
# the child's process id, and later its exit status.
_SERVER = """
import json, os, sys, traceback, warnings
import gc, pathlib, threading, torch, safetensors_torch

def run(job):
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(job["output"], os.O_WRONLY), 1)
    os.dup2(os.open(job["errors"], os.O_WRONLY), 2)
    os.chdir(job["directory"])
    os.environ.update(job["variables"])
    sys.argv = ["-c", *job["arguments"]]
    try:
        exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
        return 0
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1

warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = run(job)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.stdin.close)
    return server


def run_python(
    program: str, *arguments: object, seconds: float = 180, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``program`` in a process that has imported torch and the package, but has not used them.

    Each program has a process and a session of its own, forked from one server: a fresh Python would take seconds for
    the imports. Use a fresh Python for what concerns imports, the end of a process, or LD_PRELOAD.

    Args:
        program: the source.
        arguments: sys.argv[1:].
        seconds: the time limit, after which the session is killed.
        variables: added to the environment.

    Returns:
        The exit status, the standard output and the standard error.
    """
    server, program = _server(), textwrap.dedent(program)
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
        job = {"program": program, "arguments": [*map(str, arguments)], "directory": os.getcwd()}
        job.update(variables=variables, output=output.name, errors=errors.name)
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        timer = threading.Timer(seconds, os.killpg, (child, signal.SIGKILL))
        timer.start()
        try:
            status = int(server.stdout.readline())
        finally:
            timer.cancel()
        return subprocess.CompletedProcess(program, status, output.read(), errors.read())


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


def _printed_number(program: str) -> int:
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
