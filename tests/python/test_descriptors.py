"""Handles keep no descriptor of a mapped file open, and keep the opened file, even if its path changes."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
import torch

from fresh import run_python
from safetensors_torch import load_file, safe_open, save_file, save_sharded
from support import entry, pack

HANDLES = 3000


def run(program: str, *args: object, files: int = 1024) -> str:
    """Returns what ``program`` prints with a limit on open files."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))\n"
    done = run_python(limit + textwrap.dedent(program), *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_more_handles_are_open_than_descriptors_may_be(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0), "b": torch.ones(1 << 20)}, tmp_path / "f")
    printed = run(
        """
        import os, sys
        import torch
        from safetensors_torch import safe_open
        handles = [safe_open(sys.argv[1]) for _ in range(int(sys.argv[2]))]
        few = len(os.listdir("/proc/self/fd"))
        for file in handles:
            assert file.get_tensor("a")[5] == 5 and file.get_slice("a")[1:3].tolist() == [1, 2]
        # A conversion reads from the file, with a temporary descriptor.
        for file in handles[:20]:
            state = file._open.start_load(None, torch.device("cpu"), torch.float64, False)
            while not state.advance(1.0):
                pass
            assert state.result()[1][1].sum() == 1 << 20
        assert len(os.listdir("/proc/self/fd")) <= few
        print(few)
        """,
        tmp_path / "f",
        HANDLES,
    )
    assert int(printed) < 100


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    save_sharded({f"t{i:03}": torch.full((2,), i) for i in range(200)}, directory, max_shard_size=16)
    assert len(list(directory.glob("*.safetensors"))) == 200
    return directory


OPENS_A_CHECKPOINT = """
import sys
from safetensors_torch import load_sharded
try:
    loaded = load_sharded(sys.argv[1], backend=sys.argv[2])
    print(sum(int(tensor[0]) for tensor in loaded.values()))
except OSError as error:
    print(error)
"""


def test_a_checkpoint_of_many_shards_is_opened(shards: Path) -> None:
    assert run(OPENS_A_CHECKPOINT, shards, "mmap", files=100) == f"{sum(range(200))}\n"


def test_pread_keeps_descriptors_and_reports_the_remedy(shards: Path) -> None:
    said = run(OPENS_A_CHECKPOINT, shards, "pread", files=100)
    assert "Too many open files" in said and "as many files open as it may (100)" in said, said
    assert "raise the limit (ulimit -n)" in said and 'use the backend "mmap", which keeps no file open' in said, said


# Large tensors are read through a reopened file; small and unaligned ones are copied from the mapping.
LARGE = 3 << 20


def written(path: Path, value: int) -> None:
    header = {
        "small": entry("F32", [2], 1, 9),
        "large": entry("U8", [LARGE], 9, 9 + LARGE),
        "odd": entry("U8", [1], 0, 1),
    }
    body = bytes([value]) + torch.full((2,), float(value)).numpy().tobytes() + bytes([value]) * LARGE
    path.write_bytes(pack(header, body))


@pytest.mark.parametrize("gone", ["replaced", "removed", "renamed"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_handle_stays_with_the_file_that_it_opened(
    gone: str, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    written(path, 1)
    if relative:
        monkeypatch.chdir(tmp_path)
    file = safe_open("f" if relative else path)
    written(tmp_path / "new", 2)
    if gone == "replaced":
        os.replace(tmp_path / "new", path)
    elif gone == "removed":
        path.unlink()
    else:
        path.rename(tmp_path / "old")
        written(path, 2)
    if relative:
        monkeypatch.chdir("/")
    state = file._open.start_load(None, torch.device("cpu"), torch.float64, False)
    while not state.advance(1.0):
        pass
    converted = dict(zip(*state.result(), strict=True))
    assert converted["small"].tolist() == [1, 1] and converted["small"].dtype == torch.float64
    for tensors in (file.get_tensors(), converted):
        assert tensors["small"].tolist() == [1, 1]
        assert tensors["large"].min() == tensors["large"].max() == tensors["odd"] == 1
    file._open.start_load(None, torch.device("cpu"), None, True)


def test_writes_to_a_tensor_show_even_if_the_file_is_removed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1 << 20)}, tmp_path / "f")
    with safe_open(tmp_path / "f") as file:
        file.get_tensor("a").fill_(3)
        for there in (True, False):
            assert file._open.get_slice("a", [0], [1 << 20], [1], torch.device("cpu")).sum() == 3 << 20
            if there:
                (tmp_path / "f").unlink()


def test_a_mapped_load_keeps_nothing_open(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1 << 20)}, tmp_path / "f")
    before = sorted(os.listdir("/proc/self/fd"))
    with safe_open(tmp_path / "f") as file:
        loaded = load_file(tmp_path / "f"), file.get_tensors()
        assert sorted(os.listdir("/proc/self/fd")) == before
    del loaded
