"""prefault of load_file: which pages of a mapped file are in memory and when; it never changes a value."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from proc import eventually, mapped_bytes
from safetensors_torch import SafetensorError, load_file, save_file

pytestmark = pytest.mark.alone

COUNT = 6
BYTES = 5 * 2**20 + 4096 + 8  # of one tensor: together they are worth a thread


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.safetensors"
    tensors = {f"t{i}": torch.arange(i, i + BYTES // 8) for i in range(COUNT)}
    save_file(tensors, path, durable=True)
    return path


def check_values(loaded: dict[str, torch.Tensor]) -> None:
    for i in range(COUNT):
        assert torch.equal(loaded[f"t{i}"], torch.arange(i, i + BYTES // 8))


def make_cold(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
@pytest.mark.parametrize("prefault", [None, True, False])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_values(backend: str, prefault: bool | None, cold: bool, large: Path) -> None:
    if cold:
        make_cold(large)
    check_values(load_file(large, backend=backend, prefault=prefault))


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
def test_true_reads_every_page_before_it_returns(cold: bool, large: Path) -> None:
    if cold:
        make_cold(large)
    loaded = load_file(large, prefault=True)
    assert mapped_bytes(large) >= large.stat().st_size
    check_values(loaded)


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
def test_none_reads_every_page_in_the_background(cold: bool, large: Path) -> None:
    if cold:
        make_cold(large)
    loaded = load_file(large)
    assert eventually(lambda: mapped_bytes(large) >= large.stat().st_size)
    check_values(loaded)


def test_false_reads_pages_on_first_access(large: Path) -> None:
    loaded = load_file(large, prefault=False)
    assert mapped_bytes(large) == 0
    assert loaded["t1"][-1] == 1 + BYTES // 8 - 1
    assert 0 < mapped_bytes(large) < BYTES


def test_a_small_file_gets_no_thread(path: Path) -> None:
    before = threads()
    loaded = [load_file(path) for _ in range(50)]
    assert threads() <= before
    assert len(loaded) == 50


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_the_mapping_is_freed_with_the_last_tensor(large: Path) -> None:
    loaded = load_file(large)
    last = loaded.pop("t3")
    del loaded
    assert mapped_bytes(large) is not None
    assert torch.equal(last, torch.arange(3, 3 + BYTES // 8))
    del last
    assert eventually(lambda: mapped_bytes(large) is None), "a thread keeps the mapping"


def test_writes_during_prefault_are_kept(large: Path) -> None:
    before = large.read_bytes()
    loaded = load_file(large)
    for tensor in loaded.values():
        tensor.add_(1)
    assert eventually(lambda: mapped_bytes(large) >= large.stat().st_size)
    for i in range(COUNT):
        assert torch.equal(loaded[f"t{i}"], torch.arange(i + 1, i + 1 + BYTES // 8))
    assert large.read_bytes() == before


def test_many_at_once(large: Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for prefault in (None, True, False):
                check_values(load_file(large, prefault=prefault))
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=work) for _ in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures


@pytest.mark.parametrize("prefault", [1, "yes", 0.0])
def test_it_is_a_bool_or_none(prefault: object, path: Path) -> None:
    with pytest.raises(TypeError, match="prefault must be a bool"):
        load_file(path, prefault=prefault)


def test_it_hides_no_error(tmp_path: Path) -> None:
    for prefault in (None, True, False):
        with pytest.raises(FileNotFoundError):
            load_file(tmp_path / "absent", prefault=prefault)
        (tmp_path / "bad").write_bytes(b"\0" * 100)
        with pytest.raises(SafetensorError):
            load_file(tmp_path / "bad", prefault=prefault)
