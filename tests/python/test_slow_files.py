"""Reads from a slow filesystem: many requests are in flight, and what is needed next is requested, and no more."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ranks
import slow_distributed_cases
from fresh import run_python
from proc import ctrl_c_interrupts, eventually
from safetensors_torch import SafetensorError, iterate, load_file, load_sharded, safe_open, save_file, save_sharded

SOURCE = Path(__file__).resolve().parent.parent / "slow" / "slowfs.c"
MIB = 2**20
# Each request takes 3 ms and the time of its bytes.
MILLISECONDS, MEGABYTES_PER_SECOND = "3", "200"


def _why_not() -> str:
    if os.geteuid() != 0:
        return "only root can mount"
    if not os.access("/dev/fuse", os.W_OK):
        return "no /dev/fuse"
    return "" if shutil.which("cc") else "no C compiler"


pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]


class Requests(NamedTuple):
    """The reads that the filesystem got."""

    count: int
    at_once: int
    nbytes: int
    refused: int


# A mountpoint or a file there, and a function that returns the requests so far.
Slow = tuple[Path, Callable[[], Requests]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("slowfs") / "slowfs"
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-pthread", str(SOURCE), "-o", str(built)], check=True)
    return built


@contextlib.contextmanager
def mounted(program: Path, directory: Path, *more: str, milliseconds: str = MILLISECONDS) -> Iterator[Slow]:
    """Mounts `directory`/stored. Yields the mountpoint, and a function that returns the requests so far."""
    mountpoint = directory / "mounted"
    mountpoint.mkdir(exist_ok=True)
    server = subprocess.Popen([program, directory / "stored", mountpoint, milliseconds, MEGABYTES_PER_SECOND, *more])
    try:
        deadline = time.monotonic() + 20
        while not os.path.ismount(mountpoint):
            if server.poll() is not None:
                pytest.skip("FUSE cannot be mounted here")
            assert time.monotonic() < deadline
            time.sleep(0.01)

        def requests() -> Requests:
            return Requests(*map(int, (mountpoint / ".requests").read_text().split()))

        yield mountpoint, requests
    finally:
        subprocess.run(["umount", "--lazy", mountpoint], check=False)
        server.wait(20)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file of 6 tensors of 4 MiB, in a directory that can be mounted."""
    (tmp_path / "stored").mkdir()
    save_file({f"t{i}": torch.full((1024, 1024), float(i)) for i in range(6)}, tmp_path / "stored" / "model")
    return tmp_path


@pytest.fixture
def slow(program: Path, stored: Path) -> Iterator[Slow]:
    """The file on a slow filesystem, and a function that returns the requests so far."""
    with mounted(program, stored) as (mountpoint, requests):
        yield mountpoint / "model", requests


def _use(tensor: torch.Tensor, value: float) -> None:
    assert bool((tensor == value).all())


def test_a_tensor_of_a_mapped_file_is_read_ahead(slow: Slow) -> None:
    path, requests = slow
    with safe_open(path, "pt") as file:
        for i in range(6):
            _use(file.get_tensor(f"t{i}"), i)
    _, at_once, nbytes, _ = requests()
    # Page faults alone cause 2 requests at a time for each of the 2 threads that compare.
    assert at_once >= 6
    assert nbytes < 25 * MIB


def test_the_same_part_of_each_tensor_is_read_ahead(slow: Slow) -> None:
    path, requests = slow
    with safe_open(path, "pt") as file:
        for i in range(2):
            file.get_slice(f"t{i}")[:512]
        # Nothing was touched: the second slice has requested those of the next tensors.
        assert eventually(lambda: requests().nbytes > 6 * 1.9 * MIB)
        for i in range(6):
            _use(file.get_slice(f"t{i}")[:512], i)
    assert requests().nbytes < 1.1 * 6 * 2 * MIB


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_load_sends_large_requests_at_once(backend: str, slow: Slow) -> None:
    path, requests = slow
    for i, tensor in enumerate(load_file(path, backend=backend).values()):
        _use(tensor, i)
    count, at_once, nbytes, _ = requests()
    assert at_once >= 6
    assert nbytes < 25 * MIB
    assert count < 60


def test_direct_reads_leave_the_page_cache_alone(slow: Slow) -> None:
    path, _ = slow

    def explained() -> tuple[str, float, bool]:
        command = [sys.executable, "-m", "safetensors_torch", "explain", str(path), "--json"]
        (plan,) = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return plan["filesystem"], plan["cached"] / MIB, plan["plans"]["pread"]["direct"]

    load_file(path, backend="pread")
    filesystem, cached, is_direct = explained()
    assert (filesystem, is_direct) == ("fuse", True) and cached < 1
    load_file(path, prefault=True)
    filesystem, cached, is_direct = explained()
    assert not is_direct and cached >= 24


def test_an_overlay_is_read_as_its_slow_layer(slow: Slow, tmp_path: Path) -> None:
    path, requests = slow
    merged = tmp_path / "merged"
    merged.mkdir()
    layers = f"lowerdir={path.parent}:{tmp_path / 'stored'}"
    if subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=False).returncode != 0:
        pytest.skip("no overlay can be mounted here")
    try:
        command = [sys.executable, "-m", "safetensors_torch", "explain", str(merged / path.name), "--json"]
        (plan,) = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        plans = plan["plans"]
        assert plan["filesystem"] == "overlay"
        assert (plans["mmap"]["readers"], plans["pread"]["readers"]) == (8, 16)
        load_file(merged / path.name, prefault=True)
    finally:
        subprocess.run(["umount", merged], check=True)
    count, at_once, _, _ = requests()
    # Windows, in requests of 1 MiB.
    assert at_once >= 6 and count < 60


def test_refused_direct_reads_are_buffered(program: Path, tmp_path: Path) -> None:
    (tmp_path / "stored").mkdir()
    save_file({f"t{i:02}": torch.full((1024, 1024), float(i)) for i in range(24)}, tmp_path / "stored" / "model")

    for refuses in ("open", "read"):
        with mounted(program, tmp_path, "0", str(2**62), refuses, milliseconds="0") as (mountpoint, requests):
            for i, tensor in enumerate(load_file(mountpoint / "model", backend="pread").values()):
                _use(tensor, i)
            # The first read of each of 16 threads, which can be two requests, and not each of 96.
            assert (0 < requests().refused <= 32) if refuses == "read" else requests().refused == 0


_FAILED_READ = """
import gc, os, sys, time, torch
from safetensors_torch import iterate, load_file, load_model, load_sharded, safe_open

torch.set_num_threads(1)
path = sys.argv[1]

class Model(torch.nn.Module):
    def __init__(self, parameter):
        super().__init__()
        for i in range(6):
            setattr(self, f"t{i}", torch.nn.Parameter(parameter.clone(memory_format=torch.preserve_format)))

def held():
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), path in maps.read()

matrix = torch.zeros(1024, 1024)
before = held()
try:
    CALL
except OSError as error:
    assert error.errno == 5
    print(error)
gc.collect()
deadline = time.monotonic() + 20
while held() != before:
    assert time.monotonic() < deadline, held()
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    "call",
    [
        'load_file(path, backend="pread")',
        "load_file(path, prefault=True)",
        "load_sharded(path, prefault=True)",
        'safe_open(path, backend="pread").get_tensor("t3")',
        'safe_open(path, backend="pread").get_slice("t3")[:512]',
        'safe_open(path, backend="pread").get_slice("t3")[:, :512]',
        "load_model(Model(matrix), path)",
        "load_model(Model(matrix.t()), path)",
        "load_model(Model(matrix.half()), path)",
        "load_file(path, dtype=torch.float16)",
        'load_model(Model(matrix), path, backend="pread")',
        "list(iterate(path))",
        "list(safe_open(path).prefetch())",
        'safe_open(path).prefetch().take("t4")',
    ],
)
def test_a_failed_read_names_the_tensor(call: str, program: Path, stored: Path) -> None:
    with mounted(program, stored, "0", str(10 * MIB)) as (mountpoint, _):
        done = run_python(_FAILED_READ.replace("CALL", call), mountpoint / "model")
    assert done.returncode == 0, done.stderr
    assert re.search(r'mounted/model.*tensor "t[2-5]"', done.stdout), done.stdout


def test_a_mapped_page_that_cannot_be_read_ends_the_process(program: Path, stored: Path) -> None:
    with mounted(program, stored, "0", str(10 * MIB)) as (mountpoint, _):
        # The threads in the background give up.
        done = run_python(_FAILED_READ.replace("CALL", "load_file(path)"), mountpoint / "model")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        done = run_python(_FAILED_READ.replace("CALL", 'load_file(path)["t4"].sum()'), mountpoint / "model")
    assert done.returncode == -signal.SIGBUS


def test_a_part_of_a_tensor_is_read_ahead_and_no_more(slow: Slow) -> None:
    path, requests = slow
    with safe_open(path, "pt") as file:
        for i in range(0, 6, 2):
            _use(file.get_slice(f"t{i}")[:512], i)
    _, at_once, nbytes, _ = requests()
    assert at_once >= 6
    # Half of every second tensor, and the kernel's readahead.
    assert nbytes < 3 * (2 * MIB + MIB)


def test_tensors_that_are_taken_quickly_start_few_threads(program: Path, stored: Path) -> None:
    save_file({f"t{i:02}": torch.full((1024, 1024), float(i)) for i in range(24)}, stored / "stored" / "model")
    with mounted(program, stored, milliseconds="200") as (mountpoint, _), safe_open(mountpoint / "model", "pt") as file:
        # Not in file order, so each tensor is a request of its own, for two threads.
        tensors = {i: file.get_tensor(f"t{i:02}") for i in reversed(range(24))}
        names = []
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                names.append(Path(f"/proc/self/task/{task}/comm").read_text())
        assert 0 < names.count("sft-prefault\n") <= 32
        for i in (0, 23):
            _use(tensors[i], i)
        del tensors


def test_a_row_is_not_read_ahead(slow: Slow) -> None:
    path, requests = slow
    with safe_open(path, "pt") as file:
        for i in range(6):
            _use(file.get_slice(f"t{i}")[700], i)
            _use(file.get_slice(f"t{i}")[::512], i)
    assert requests().nbytes < 6 * MIB


def test_two_threads_that_want_one_tensor(slow: Slow) -> None:
    path, _ = slow
    with safe_open(path) as file:
        loader = file.prefetch()
    taken: list[object] = []

    def take() -> None:
        try:
            taken.append(loader.take("t5"))
        except SafetensorError as error:
            taken.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = [one for one in taken if isinstance(one, str)]
    assert "already delivered" in error
    assert {name for name, _ in loader} == {f"t{i}" for i in range(5)}
    loader.close()


@pytest.mark.parametrize("wait", ["take", "next", "iterate"])
def test_ctrl_c_ends_the_wait_for_a_tensor(wait: str, program: Path, stored: Path) -> None:
    with mounted(program, stored, milliseconds="60") as (mountpoint, _), ctrl_c_interrupts():
        path = mountpoint / "model"
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


def test_small_files_of_a_checkpoint_are_read_together(slow: Slow, tmp_path: Path) -> None:
    path, requests = slow
    tensors = {f"t{i}": torch.full((1024, 1024), float(i)) for i in range(12)}
    index = save_sharded(tensors, tmp_path / "stored", max_shard_size=4 * MIB)[-1]
    loaded = load_sharded(path.with_name(index), backend="pread")
    for i in range(12):
        _use(loaded[f"t{i}"], i)
    # A file of one chunk is read by one thread, which causes 2 requests at a time.
    assert requests().at_once >= 6


def test_processes_read_their_parts_and_what_they_share_once(program: Path, tmp_path: Path) -> None:
    (tmp_path / "stored").mkdir()
    for name in ("rows", "replicated", "weights"):
        tensors = {f"t{i}": torch.full((1024, 1024), float(i)) for i in range(slow_distributed_cases.TENSORS)}
        save_file(tensors, tmp_path / "stored" / f"{name}.safetensors")
    for name in ("first", "second"):
        save_file({name: torch.zeros(10)}, tmp_path / "stored" / f"{name}.safetensors")
    with mounted(program, tmp_path) as (mountpoint, _):
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "mounted").symlink_to(mountpoint)
        assert ranks.run("slow_distributed_cases", 2, tmp_path / "root") == {}
