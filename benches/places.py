"""Where the files of a data set lie: on the disk, on a slow network filesystem, or on a loop device over memory.

Owns the mounts. data.py says which data set lies where.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import machine

MEMORY = Path("/dev/shm")
LATENCY_MS, STREAM_MB = 2, 200
# The requests of the kernel's readahead that the network filesystem takes at once; as in mountpoint-s3.
MOST_REQUESTS = 64
_SLOWFS = Path(__file__).resolve().parent.parent / "tests" / "slow" / "slowfs.c"


class Unavailable(Exception):
    """A place that this machine or user cannot have. The text says why."""


@dataclass(frozen=True)
class Place:
    """A place for files, while it is mounted."""

    files: Path  # where files are written to
    sources: Path  # where the timed runs read them
    requests: Path | None = None  # counts the bytes that were read, if the filesystem does

    def served_bytes(self) -> int | None:
        """Returns how many bytes the filesystem has read so far, if it counts them."""
        return int(self.requests.read_text().split()[2]) if self.requests else None


@contextlib.contextmanager
def at(kind: str, directory: Path, nbytes: int) -> Iterator[Place]:
    """Returns a place for `nbytes` of files: "disk" is `directory`, "network" and "loop" keep theirs in memory."""
    if kind == "disk":
        yield Place(directory, directory)
        return
    if os.geteuid() != 0:
        raise Unavailable("only root can mount a filesystem")
    # The file, its pages in the page cache, and the tensors of two processes.
    if machine.available_memory() < 5 * nbytes or machine.free_disk(MEMORY) < 1.5 * nbytes:
        raise Unavailable(f"it takes {5 * nbytes / 1e9:.0f} GB of memory")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=MEMORY) as name, contextlib.ExitStack() as stack:
        files, mounted = Path(name) / "files", Path(name) / "mounted"
        files.mkdir()
        mounted.mkdir()
        if kind == "loop":
            _mount_loop(Path(name) / "image", mounted, nbytes, stack)
            yield Place(mounted, mounted)
        else:
            _mount_network(files, mounted, Path(name) / "slowfs", stack)
            yield Place(files, mounted, mounted / ".requests")


def _mount_loop(image: Path, mounted: Path, nbytes: int, stack: contextlib.ExitStack) -> None:
    with image.open("wb") as file:
        file.truncate(int(1.1 * nbytes) + (64 << 20))
    if shutil.which("mkfs.ext4") is None:
        raise Unavailable("mkfs.ext4 is not installed")
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mounted)]).returncode != 0:
        raise Unavailable("a loop device cannot be mounted")
    stack.callback(subprocess.run, ["umount", str(mounted)], check=True)


def _mount_network(files: Path, mounted: Path, program: Path, stack: contextlib.ExitStack) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Unavailable("there is no /dev/fuse")
    subprocess.run(["cc", "-O2", "-pthread", str(_SLOWFS), "-o", str(program)], check=True)
    settings = map(str, (LATENCY_MS, STREAM_MB, MOST_REQUESTS))
    server = subprocess.Popen([str(program), str(files), str(mounted), *settings])
    stack.callback(server.wait, timeout=60)
    while not mounted.is_mount():
        if server.poll() is not None:
            raise Unavailable("slowfs cannot be mounted")
        time.sleep(0.01)
    stack.callback(subprocess.run, ["umount", str(mounted)], check=True)
