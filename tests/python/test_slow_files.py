"""Reads from a slow filesystem: the pages that are needed next are requested in advance."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from proc import ctrl_c_interrupts
from safetensors_torch import iterate, load_sharded, safe_open, save_file, save_sharded

SOURCE = Path(__file__).resolve().parent.parent / "slow" / "slowfs.c"
MIB = 2**20
# Each request of 128 KiB takes 3 ms and the time of its bytes.
MILLISECONDS, MEGABYTES_PER_SECOND = "3", "200"


def _why_not() -> str:
    if os.geteuid() != 0:
        return "only root can mount"
    if not os.access("/dev/fuse", os.W_OK):
        return "no /dev/fuse"
    return "" if shutil.which("cc") else "no C compiler"


pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]

Requests = Callable[[], tuple[int, int, int]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("slowfs") / "slowfs"
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-pthread", str(SOURCE), "-o", str(built)], check=True)
    return built


@pytest.fixture
def slow(program: Path, tmp_path: Path) -> Iterator[tuple[Path, Requests]]:
    with mount(program, tmp_path, MILLISECONDS) as mounted:
        yield mounted


@contextlib.contextmanager
def mount(program: Path, tmp_path: Path, milliseconds: str) -> Iterator[tuple[Path, Requests]]:
    """A file of 6 tensors of 4 MiB on a slow filesystem, and a function that returns the requests so far."""
    stored, mounted = tmp_path / "stored", tmp_path / "mounted"
    stored.mkdir()
    mounted.mkdir()
    save_file({f"t{i}": torch.full((1024, 1024), float(i)) for i in range(6)}, stored / "model")
    server = subprocess.Popen([program, stored, mounted, milliseconds, MEGABYTES_PER_SECOND])
    try:
        deadline = time.monotonic() + 20
        while not os.path.ismount(mounted):
            if server.poll() is not None:
                pytest.skip("FUSE cannot be mounted here")
            assert time.monotonic() < deadline
            time.sleep(0.01)

        def requests() -> tuple[int, int, int]:
            """Returns the number of requests, the most at once, and their bytes."""
            count, at_once, nbytes = (mounted / ".requests").read_text().split()
            return int(count), int(at_once), int(nbytes)

        yield mounted / "model", requests
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=False)
        server.wait(20)


def _use(tensor: torch.Tensor, value: float) -> None:
    assert bool((tensor == value).all())


def test_a_tensor_of_a_mapped_file_is_read_ahead(slow: tuple[Path, Requests]) -> None:
    path, requests = slow
    with safe_open(path, "pt") as file:
        for i in range(6):
            _use(file.get_tensor(f"t{i}"), i)
    _, at_once, nbytes = requests()
    # Page faults alone cause 2 requests at a time for each of the 2 threads that compare.
    assert at_once >= 6
    assert nbytes < 25 * MIB


def test_a_part_of_a_tensor_is_read_ahead_and_no_more(slow: tuple[Path, Requests]) -> None:
    path, requests = slow
    with safe_open(path, "pt") as file:
        for i in range(0, 6, 2):
            _use(file.get_slice(f"t{i}")[:512], i)
    _, at_once, nbytes = requests()
    assert at_once >= 6
    # Half of every second tensor, and the kernel's readahead.
    assert nbytes < 3 * (2 * MIB + MIB)


def test_a_row_is_not_read_ahead(slow: tuple[Path, Requests]) -> None:
    path, requests = slow
    with safe_open(path, "pt") as file:
        for i in range(6):
            _use(file.get_slice(f"t{i}")[700], i)
            _use(file.get_slice(f"t{i}")[::512], i)
    assert requests()[2] < 6 * MIB


@pytest.mark.parametrize("wait", ["take", "next", "iterate"])
def test_ctrl_c_ends_the_wait_for_a_tensor(wait: str, program: Path, tmp_path: Path) -> None:
    with mount(program, tmp_path, "60") as (path, _), ctrl_c_interrupts():
        with safe_open(path) as file:
            loader = file.prefetch()
        signalled: list[float] = []

        def interrupt() -> None:
            signalled.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(0.1, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            if wait == "take":
                loader.take("t5")
            else:
                next(iter(loader if wait == "next" else iterate(path)))
        assert time.monotonic() - signalled[0] < 1
        # The tensors are still being read.
        assert bool((loader.take("t5") == 5).all())
        loader.close()


def test_small_files_of_a_checkpoint_are_read_together(slow: tuple[Path, Requests], tmp_path: Path) -> None:
    path, requests = slow
    tensors = {f"t{i}": torch.full((1024, 1024), float(i)) for i in range(12)}
    index = save_sharded(tensors, tmp_path / "stored", max_shard_size=4 * MIB)[-1]
    loaded = load_sharded(path.with_name(index), backend="pread")
    for i in range(12):
        _use(loaded[f"t{i}"], i)
    # A file of one chunk is read by one thread, which causes 2 requests at a time.
    assert requests()[1] >= 6
