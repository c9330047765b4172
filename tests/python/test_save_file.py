"""save_file replaces the file atomically, keeps its permissions, and leaves no leftovers."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from random_state import difference
from safetensors_torch import SafetensorError, load_file, save, save_file
from support import encode, entries, mode, umask, unprivileged

ONES = {"a": torch.ones(1000)}
TWOS = {"a": torch.full((1000,), 2.0)}


def constant(value: int) -> dict[str, torch.Tensor]:
    """A tensor of 8 MiB, more than one write call or page."""
    return {"first": torch.full((1 << 20,), value), "last": torch.full((1 << 17,), value, dtype=torch.uint8)}


@pytest.mark.parametrize("kind", [str, Path, os.fsencode], ids=["str", "PathLike", "bytes"])
def test_path_kinds(kind: Callable, tmp_path: Path) -> None:
    save_file(ONES, kind(tmp_path / "a"))
    assert entries(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == encode(ONES)


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(ONES, "a")
    save_file(TWOS, "./a")
    assert entries(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == encode(TWOS)


@pytest.mark.parametrize("filename", [None, 3, ["a"]], ids=["None", "int", "list"])
def test_other_paths_are_type_errors(filename: object) -> None:
    with pytest.raises(TypeError):
        save_file(ONES, filename)


def test_path_with_a_null_byte_is_not_cut_there(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError, SafetensorError)):
        save_file(ONES, f"{tmp_path}/a\0b")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("length", [1, 200, 255])
def test_long_file_names(length: int, tmp_path: Path) -> None:
    """The name has the maximal length, although a hidden file is written beside the target."""
    target = tmp_path / ("n" * length)
    for tensors in (ONES, TWOS):
        save_file(tensors, target)
        assert entries(tmp_path) == [target.name]
        assert target.read_bytes() == encode(tensors)


def test_shorter_file_replaces_a_longer_one(tmp_path: Path) -> None:
    target = tmp_path / "a"
    save_file(constant(1), target)
    save_file(ONES, target)
    assert target.read_bytes() == encode(ONES)


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0, 0o666)])
def test_new_file_has_the_permissions_that_the_umask_gives(mask: int, expected: int, tmp_path: Path) -> None:
    with umask(mask):
        save_file(ONES, tmp_path / "a")
        assert mode(tmp_path / "a") == expected
        assert os.umask(mask) == mask


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o644, 0o666, 0o755, 0o440])
def test_existing_file_keeps_its_permissions(kept: int, tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    target.chmod(kept)
    with umask(0o027):
        save_file(ONES, target)
    assert mode(target) == kept
    assert target.read_bytes() == encode(ONES)


def test_another_hard_link_keeps_the_old_file(tmp_path: Path) -> None:
    """The target is replaced, not written into."""
    target, other = tmp_path / "a", tmp_path / "b"
    save_file(ONES, target)
    os.link(target, other)
    save_file(TWOS, target)
    assert other.read_bytes() == encode(ONES)
    assert target.read_bytes() == encode(TWOS)


@pytest.mark.parametrize("after", [TWOS, {}], ids=["same size", "smaller"])
def test_tensors_of_the_replaced_file_keep_their_values(after: dict, backend: str, tmp_path: Path) -> None:
    target = tmp_path / "a"
    save_file(constant(1), target)
    loaded = load_file(target, backend=backend)
    save_file(after, target)
    assert difference(loaded, constant(1)) is None
    assert difference(load_file(target), after) is None


def test_saving_over_the_file_that_the_tensors_come_from(backend: str, tmp_path: Path) -> None:
    target = tmp_path / "a"
    save_file(constant(1), target)
    loaded = load_file(target, backend=backend)
    loaded["last"].fill_(3)
    save_file(loaded, target)
    expected = {**constant(1), "last": constant(3)["last"]}
    assert difference(load_file(target), expected) is None
    assert difference(loaded, expected) is None


def test_readers_see_the_old_file_or_the_new_one(backend: str, tmp_path: Path) -> None:
    target = tmp_path / "a"
    save_file(constant(0), target)
    seen: list[set[int]] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            loaded = load_file(target, backend=backend)
            seen.append({int(value) for tensor in loaded.values() for value in tensor[[0, len(tensor) // 2, -1]]})

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for value in range(1, 25):
            save_file(constant(value), target)
    finally:
        done.set()
        reader.join()
    assert seen
    assert all(len(values) == 1 for values in seen)
    assert entries(tmp_path) == ["a"]


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file may grow beyond 1 MiB, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("exists", [True, False])
def test_failed_write_leaves_what_was_there(exists: bool, no_room: None, tmp_path: Path) -> None:
    target = tmp_path / "a"
    if exists:
        save_file(ONES, target)
    with pytest.raises(OSError, match=str(target)):
        save_file(constant(1), target)
    assert entries(tmp_path) == (["a"] if exists else [])
    assert not exists or target.read_bytes() == encode(ONES)


def test_directory(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        save_file(ONES, directory)
    assert str(directory) in str(caught.value)
    assert entries(tmp_path) == ["directory"] and entries(directory) == []


def test_missing_directory(tmp_path: Path) -> None:
    target = tmp_path / "absent" / "a"
    with pytest.raises(FileNotFoundError) as caught:
        save_file(ONES, target)
    assert str(target) in str(caught.value)
    assert entries(tmp_path) == []


def test_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(NotADirectoryError) as caught:
        save_file(ONES, tmp_path / "file" / "a")
    assert str(tmp_path / "file" / "a") in str(caught.value)


@pytest.mark.parametrize("exists", [True, False])
def test_directory_without_write_permission(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "a"
    if exists:
        target.write_bytes(b"old")
        target.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        with unprivileged(), pytest.raises(PermissionError) as caught:
            save_file(ONES, target)
    finally:
        tmp_path.chmod(0o755)
    assert str(target) in str(caught.value)
    assert entries(tmp_path) == (["a"] if exists else [])
    assert not exists or target.read_bytes() == b"old"


def holds_unnamed_files(directory: Path) -> bool:
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        return False
    return True


# Kills a process that saves in a loop eight times, each time later in a save, and prints the files that remain.
KILLED = """
    import ctypes, json, os, select, signal, sys, time
    import torch
    from safetensors_torch import load_file, save_file

    def die_with_the_parent(parent):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    die_with_the_parent(int(sys.argv[3]))
    torch.set_num_threads(1)  # a thread pool does not survive the fork
    directory, replaces = sys.argv[1], sys.argv[2] == "replaced"
    target = os.path.join(directory, "a")
    tensors = {"a": torch.zeros(1 << 21)}
    for attempt in range(8):
        parent = os.getpid()
        saved, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                die_with_the_parent(parent)
                tensors["a"].fill_(attempt)
                while True:
                    if not replaces and os.path.exists(target):
                        os.unlink(target)
                    save_file(tensors, target)
                    os.write(tell, b".")
            finally:
                os._exit(1)
        os.close(tell)
        in_time = select.select([saved], [], [], 30)[0] and os.read(saved, 1)
        time.sleep(0.002 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(saved)
        if not in_time:
            sys.exit("nothing was saved")
        left = sorted(os.listdir(directory))
        values = load_file(target)["a"].unique().tolist() if "a" in left else None
        print(json.dumps([left, values]))
        for name in left:
            if name != "a":
                os.unlink(os.path.join(directory, name))
"""


@pytest.mark.parametrize("what", ["new", "replaced"])
def test_a_killed_process_leaves_no_torn_file_and_no_leftovers(what: str, tmp_path: Path) -> None:
    """A new file has no name until it is complete. A replacement has a hidden name for a moment."""
    if not holds_unnamed_files(tmp_path):
        pytest.skip("this filesystem has no unnamed files")
    if what == "replaced":
        save_file({"a": torch.full((1 << 21,), -1.0)}, tmp_path / "a")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), what, str(os.getpid())]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=400)
    kills = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kills) == 8
    for attempt, (left, values) in enumerate(kills):
        stray = [name for name in left if name != "a"]
        if what == "new":
            assert stray == []
            assert values in (None, [attempt])
        else:
            assert len(stray) <= 1 and all(fnmatch(name, ".safetensors-*.tmp") for name in stray)
            assert values == [attempt]


def test_real_tensors_under_a_mode_for_fake_ones(tmp_path: Path) -> None:
    """A fake mode does not apply to a save, which computes nothing."""
    value = torch.complex(torch.arange(3.0), torch.arange(3.0, 6.0))
    tensors = {"plain": torch.arange(5), "conjugate": value.conj()}
    with FakeTensorMode():
        save_file(tensors, tmp_path / "a")
        data = save(tensors)
    expected = {"plain": torch.arange(5), "conjugate": value.conj().resolve_conj()}
    assert difference(load_file(tmp_path / "a"), expected) is None
    assert data == (tmp_path / "a").read_bytes()
