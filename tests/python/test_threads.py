"""Many threads load and save at once: files of their own, one file, one open handle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from random_state import difference
from safetensors_torch import SafetensorError, load, load_file, load_model, safe_open, save, save_file
from support import bits

THREADS = 8
TURNS = 12
# Loads of two of the sizes use several threads.
COUNTS = {"small": 3, "scalar": 1, "medium": 70_001, "large": 1_600_003, "larger": 2_000_001}


def state(value: int) -> dict[str, torch.Tensor]:
    tensors = {name: torch.arange(count, dtype=torch.float32) + value for name, count in COUNTS.items()}
    return {**tensors, "matrix": torch.arange(60_000).reshape(300, 200) + value, "mask": torch.arange(9) % 2 == 0}


def together(work: Callable[[int], None], threads: int = THREADS) -> None:
    """Runs ``work`` with every number below ``threads``, in threads that start at the same time."""
    barrier = threading.Barrier(threads)

    def begin(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(threads) as pool:
        for outcome in [pool.submit(begin, number) for number in range(threads)]:
            outcome.result(timeout=300)


def test_files_of_their_own(tmp_path: Path, backend: str) -> None:
    def work(number: int) -> None:
        tensors, path = state(number), tmp_path / str(number)
        for _ in range(TURNS // 3):
            save_file(tensors, path, {"thread": str(number)})
            assert difference(load_file(path, backend=backend), tensors) is None
            data = save(tensors)
            assert difference(load(data), tensors) is None
            assert difference(load(bytearray(data), copy=False), tensors) is None

    together(work)


def test_one_file_that_all_of_them_load(tmp_path: Path, backend: str) -> None:
    tensors, path = state(1), tmp_path / "one"
    save_file(tensors, path)
    half = tensors["large"].half()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = torch.nn.Parameter(torch.zeros(COUNTS["large"]))

    def work(number: int) -> None:
        for _ in range(TURNS // 3):
            loaded = load_file(path, backend=backend)
            assert difference(loaded, tensors) is None
            # Other processes do not see this.
            loaded["matrix"].zero_()
            assert torch.equal(load_file(path, backend=backend, dtype=torch.float16)["large"], half)
            model = Model()
            load_model(model, path, strict=False, backend=backend)
            assert torch.equal(model.large, tensors["large"])

    together(work)


def test_one_file_that_all_of_them_save(tmp_path: Path, backend: str) -> None:
    """A load sees the complete file of one of them."""
    path = tmp_path / "one"
    save_file(state(0), path)
    expected = [state(number) for number in range(THREADS)]

    def work(number: int) -> None:
        for _ in range(TURNS):
            if number % 2:
                save_file(expected[number], path)
            else:
                loaded = load_file(path, backend=backend)
                value = int(loaded["scalar"].item())
                assert difference(loaded, expected[value]) is None

    together(work)
    assert [entry.name for entry in tmp_path.iterdir()] == ["one"]


def test_one_handle_that_all_of_them_use(tmp_path: Path, backend: str) -> None:
    tensors, path = state(1), tmp_path / "one"
    save_file(tensors, path)
    with safe_open(path, backend=backend) as file:
        part = file.get_slice("matrix")

        def work(number: int) -> None:
            for turn in range(TURNS):
                name = list(tensors)[(number + turn) % len(tensors)]
                assert difference({name: file.get_tensor(name)}, {name: tensors[name]}) is None
                assert torch.equal(part[number::7, turn], tensors["matrix"][number::7, turn])
                assert torch.equal(part[[number, -1], 5:], tensors["matrix"][[number, -1], 5:])
                assert file.keys() == sorted(tensors) and name in file
                if turn % 4 == 0:
                    assert difference(file.get_tensors(), tensors) is None

        together(work)


def test_a_handle_that_another_thread_closes(tmp_path: Path, backend: str) -> None:
    """Each call succeeds, or raises that the file is closed."""
    tensors, path = state(1), tmp_path / "one"
    save_file(tensors, path)
    for _ in range(TURNS):
        file = safe_open(path, backend=backend)

        def work(number: int, file: safe_open = file) -> None:
            if number == 0:
                file.__exit__(None, None, None)
                return
            try:
                loaded = file.get_tensors()
            except SafetensorError as error:
                assert str(error).startswith("File is closed")
            else:
                assert difference(loaded, tensors) is None

        together(work, threads=4)


def test_each_thread_gets_its_own_error(tmp_path: Path, backend: str) -> None:
    good = tmp_path / "good"
    save_file({"a": torch.ones(2)}, good)
    bad = tmp_path / "bad"
    bad.write_bytes(b"<html>")
    shared = torch.ones(4)
    refused = [
        (lambda: load_file(tmp_path / "absent", backend=backend), FileNotFoundError, "absent"),
        (lambda: load_file(bad, backend=backend), SafetensorError, "bad"),
        (lambda: load_file(good, backend=backend, names=["wait"]), SafetensorError, "wait"),
        (lambda: safe_open(good, backend=backend).get_slice("a")[2], IndexError, "2"),
        (lambda: save({"b": shared, "c": shared}), RuntimeError, "share memory"),
        (lambda: save({"d": torch.ones(2, 3).t()}), ValueError, "`d`"),
        (lambda: save_file({"e": shared}, tmp_path), IsADirectoryError, str(tmp_path)),
    ]

    def work(number: int) -> None:
        for turn in range(20 * TURNS):
            call, error, text = refused[(number + turn) % len(refused)]
            with pytest.raises(error, match=text) as caught:
                call()
            assert type(caught.value) is error

    together(work)


def test_what_one_thread_loads_another_may_free(tmp_path: Path, backend: str) -> None:
    tensors, path = state(3), tmp_path / "one"
    save_file(tensors, path)
    expected = {name: bits(tensor) for name, tensor in tensors.items() if tensor.numel() < 100}
    given: list[dict[str, torch.Tensor]] = []
    room = threading.Semaphore(4)
    full = threading.Semaphore(0)

    def work(number: int) -> None:
        for _ in range(TURNS):
            if number % 2:
                room.acquire()
                given.append(load_file(path, backend=backend))
                full.release()
            else:
                assert full.acquire(timeout=60)
                taken = given.pop()
                assert {name: bits(taken[name]) for name in expected} == expected
                del taken
                room.release()

    together(work)
