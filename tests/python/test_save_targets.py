"""The target of a save: a link, a relative path, a descriptor, a pipe; Ctrl-C ends a save that waits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from proc import ctrl_c_interrupts
from safetensors_torch import (
    IncrementalWriter,
    _progress,
    edit_metadata,
    load,
    load_file,
    load_sharded,
    safe_open,
    save_file,
    save_model,
    save_sharded,
)
from support import entries, mode

ONES = {"a": torch.ones(1000)}
TWOS = {"a": torch.full((1000,), 2.0)}
# Larger than what a pipe holds.
LARGE = {"a": torch.arange(1 << 18)}

Save = Callable[[Path], object]


def write(path: Path) -> None:
    with IncrementalWriter(path, ONES) as writer:
        writer.write("a", ONES["a"])


SAVES: dict[str, Save] = {
    "save_file": lambda path: save_file(ONES, path),
    "IncrementalWriter": write,
    "save_sharded": lambda path: save_sharded(ONES, path.parent, stem="model"),
    "save_model": lambda path: save_model(torch.nn.Linear(2, 3), path),
    "edit_metadata": lambda path: edit_metadata(path, {"k": "v"}),
}


@pytest.fixture(params=SAVES.values(), ids=SAVES.keys())
def save(request: pytest.FixtureRequest) -> Save:
    return request.param


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_link_is_replaced_and_its_target_stays(save: Save, relative: bool, tmp_path: Path) -> None:
    """In the cache of Hugging Face's tools, revisions share a blob through links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    blob, link = blobs / "0123", snapshot / "model.safetensors"
    # The header has room for an edit in place.
    save_file(TWOS, blob, {"k": "something longer"})
    blob.chmod(0o640)
    before = blob.read_bytes()
    link.symlink_to("../blobs/0123" if relative else blob)
    save(link)
    assert not link.is_symlink() and mode(link) == 0o640
    assert blob.read_bytes() == before
    assert load_file(link)
    assert entries(blobs) == ["0123"] and entries(snapshot) == ["model.safetensors"]


@pytest.mark.parametrize("to", ["nothing", "link", "directory"])
def test_link_to_no_file_is_replaced(to: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    link = tmp_path / "link"
    link.symlink_to(to)
    save_file(ONES, link)
    assert link.is_file() and not link.is_symlink()
    assert entries(tmp_path) == ["directory", "link"] and entries(tmp_path / "directory") == []


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The current directory, and another one with a file of the same name."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (there / "model.safetensors").write_bytes(b"theirs")
    monkeypatch.chdir(here)
    return here, there


@pytest.mark.parametrize("name", ["save_file", "save_sharded", "edit_metadata"])
def test_current_directory_that_changes_during_a_save(
    name: str, directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes between the first step and the second."""
    here, there = directories
    left: list[str] = []

    large = {"a": torch.arange(1 << 22), "b": torch.arange(1 << 22)}

    def leave(done: int, total: int) -> None:
        if not left:
            assert (here / "model.safetensors").stat().st_ino == replaced  # not renamed yet
            left.append(name)
            os.chdir(there)

    save_file({**large, "other": torch.zeros(3)}, "model.safetensors")
    replaced = (here / "model.safetensors").stat().st_ino
    monkeypatch.setattr(_progress, "STEP_SECONDS", 0.0)
    if name == "save_file":
        save_file(large, "model.safetensors", progress=leave)
    elif name == "save_sharded":
        save_sharded(large, ".", progress=leave)
    else:
        edit_metadata("model.safetensors", {"k": "v"}, progress=leave)
    assert left == [name] and Path.cwd() == there
    assert (there / "model.safetensors").read_bytes() == b"theirs"
    assert entries(there) == entries(here) == ["model.safetensors"]
    with safe_open(here / "model.safetensors", "pt") as file:
        assert len(file) == (3 if name == "edit_metadata" else 2)
        assert (file.metadata() or {}).get("k") == ("v" if name == "edit_metadata" else None)


def test_current_directory_that_changes_while_tensors_are_written(directories: tuple[Path, Path]) -> None:
    here, there = directories
    with IncrementalWriter("model.safetensors", ONES) as writer:
        os.chdir(there)
        writer.write("a", ONES["a"])
    assert (there / "model.safetensors").read_bytes() == b"theirs"
    assert load_file(here / "model.safetensors")["a"].equal(ONES["a"])
    assert entries(there) == entries(here) == ["model.safetensors"]


@pytest.mark.parametrize("form", ["/proc/self/fd/{}", "/dev/fd/{}"])
@pytest.mark.parametrize("deleted", [False, True], ids=["named", "deleted"])
def test_descriptor_of_a_file_is_written_to(form: str, deleted: bool, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w+b") as log:
        log.write(b"head")
        log.flush()
        if deleted:
            path.unlink()
        save_file(ONES, form.format(log.fileno()))
        assert entries(tmp_path) == ([] if deleted else ["log"])
        log.seek(0)
        written = log.read()
    assert written[:4] == b"head" and load(written[4:])["a"].equal(ONES["a"])


def test_standard_output_that_is_a_file(tmp_path: Path) -> None:
    program = """
import os, torch
from safetensors_torch import save_file
os.write(1, b"head")
save_file({"a": torch.ones(1000)}, "/dev/stdout")
os.write(1, b"tail")
"""
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True, timeout=300)
    written = (tmp_path / "out").read_bytes()
    assert written.startswith(b"head") and written.endswith(b"tail")
    assert load(written[4:-4])["a"].equal(ONES["a"])
    assert entries(tmp_path) == ["out"]


def test_descriptors_are_refused_by_functions_that_replace(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file(TWOS, path)
    with path.open("r+b") as file:
        name = f"/dev/fd/{file.fileno()}"
        for refused in (lambda: IncrementalWriter(name, ONES), lambda: edit_metadata(name, {"k": "v"})):
            with pytest.raises(OSError, match=f"{name}.*name the file itself"):
                refused()
    assert load_file(path)["a"].equal(TWOS["a"])
    assert entries(tmp_path) == ["file"]


@contextlib.contextmanager
def interrupted(unblock: Callable[[], object]) -> Iterator[None]:
    """Sends Ctrl-C after a moment, to which the body must react within a second; otherwise ``unblock`` ends it."""
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timers = [threading.Timer(0.3, interrupt), threading.Timer(20, unblock)]
    with ctrl_c_interrupts():
        for timer in timers:
            timer.daemon = True
            timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                yield
            seconds = time.monotonic() - sent[0]
        finally:
            for timer in timers:
                timer.cancel()
    assert seconds < 1.5


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.mark.alone
@pytest.mark.parametrize("progress", [None, lambda done, total: None], ids=["silent", "progress"])
def test_ctrl_c_ends_a_wait_for_a_reader_of_a_pipe(progress: object, fifo: Path) -> None:
    with interrupted(lambda: fifo.read_bytes()):
        save_file(LARGE, fifo, progress=progress)
    assert entries(fifo.parent) == ["fifo"]


@pytest.mark.alone
def test_ctrl_c_ends_a_write_to_a_full_pipe(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with interrupted(lambda: os.close(os.dup2(os.open("/dev/null", os.O_RDONLY), reader))):
            save_file(LARGE, fifo)
    finally:
        os.close(reader)


def test_pipe_with_a_late_and_slow_reader(fifo: Path) -> None:
    received: list[bytes] = []

    def read() -> None:
        time.sleep(0.3)
        with fifo.open("rb") as pipe:
            while chunk := pipe.read(1 << 18):
                received.append(chunk)
                time.sleep(0.05)

    reader = threading.Thread(target=read)
    reader.start()
    told: list[int] = []
    save_file(LARGE, fifo, progress=lambda done, total: told.append(done))
    reader.join()
    assert load(b"".join(received))["a"].equal(LARGE["a"])
    assert told == sorted(told) and len(set(told)) > 2


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A directory in which another save is changing names."""
    with (tmp_path / ".safetensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


@pytest.mark.alone
def test_ctrl_c_ends_a_save_that_waits_for_another_one(locked: Path) -> None:
    with interrupted(lambda: (locked / ".safetensors.lock").unlink()):
        save_sharded(ONES, locked)
    assert entries(locked) == [".safetensors.lock"]


@pytest.mark.alone
def test_ctrl_c_ends_a_load_that_waits_for_a_save(locked: Path) -> None:
    with interrupted(lambda: None):
        load_sharded(locked)


def test_save_continues_after_the_other_one(tmp_path: Path) -> None:
    lock = (tmp_path / ".safetensors.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    timer = threading.Timer(0.4, lock.close)
    timer.start()
    begin = time.monotonic()
    save_sharded(ONES, tmp_path)
    assert time.monotonic() - begin > 0.3
    timer.join()
    assert entries(tmp_path) == ["model.safetensors"]


def test_reader_of_a_directory_does_not_block_a_save(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        begin = time.monotonic()
        save_sharded(ONES, tmp_path)
        assert time.monotonic() - begin < 5
    finally:
        os.close(directory)
