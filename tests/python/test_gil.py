"""Other Python threads run while the native functions move bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safetensors_torch import SafeWriter, edit_metadata, load, load_file, load_model, save, save_file

BYTES = 300 * 2**20  # long enough for many turns of another thread


class One(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(BYTES // 4))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gil") / "one"
    save_file({"weight": torch.ones(BYTES // 4)}, path)
    return path


def write_one(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with SafeWriter(path, tensors) as writer:
        writer.write("weight", tensors["weight"])


@pytest.fixture(scope="module")
def works(file: Path) -> dict[str, Callable[[], object]]:
    save_file({"weight": torch.ones(BYTES // 4)}, file.with_name("edited"))
    model, data, tensors = One(), file.read_bytes(), {"weight": torch.ones(BYTES // 4)}
    return {
        "load_file": lambda: load_file(file, backend="pread"),
        "load": lambda: load(data),
        "load_model": lambda: load_model(model, file),
        "save": lambda: save(tensors),
        "save_file": lambda: save_file(tensors, file.with_name("saved")),
        "SafeWriter": lambda: write_one(file.with_name("written"), tensors),
        "edit_metadata": lambda: edit_metadata(file.with_name("edited"), {}, in_place=False),
    }


NAMES = ["load_file", "load", "load_model", "save", "save_file", "SafeWriter", "edit_metadata"]


@pytest.mark.parametrize("name", NAMES)
def test_other_threads_run_meanwhile(name: str, works: dict[str, Callable[[], object]]) -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.0005):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        turns = 0
        for _ in range(10):
            start = time.perf_counter()
            result = works[name]()
            end = time.perf_counter()
            del result
            # Away from both ends, where Python itself is at work.
            edge = (end - start) / 5
            turns = max(turns, sum(start + edge < moment < end - edge for moment in ticks))
            if turns >= 3:
                return
        pytest.fail(f"no more than {turns} turns of another thread in a call of {end - start:.3f} s")
    finally:
        done.set()
        thread.join()
