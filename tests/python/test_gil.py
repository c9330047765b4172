"""Other Python threads run while the native functions move bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safetensors_torch import IncrementalWriter, edit_metadata, load, load_file, load_model, safe_open, save, save_file
from support import entry, pack

pytestmark = pytest.mark.alone

BYTES = 300 * 2**20  # long enough for many turns of another thread
COUNT = BYTES // 4
CPU = torch.device("cpu")

ops = torch.ops.safetensors_torch


class One(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(COUNT))


class Given:
    """The inputs of the calls below."""

    def __init__(self, path: Path) -> None:
        self.tensors = {"weight": torch.ones(COUNT)}
        save_file(self.tensors, path)
        self.path, self.name = path, str(path)
        self.saved = path.with_name("saved")
        self.edited = path.with_name("edited")
        save_file(self.tensors, self.edited)
        self.data = path.read_bytes()
        self.model = One()
        self.many = path.with_name("many")
        self.many.write_bytes(pack({f"tensor.{number}": entry("F32", [0], 0, 0) for number in range(200_000)}))
        self.open = safe_open(path, backend="pread")
        self.part = self.open.get_slice("weight")
        self.file = torch.classes.safetensors_torch.File(self.name, "mmap")


def write_one(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with IncrementalWriter(path, tensors) as writer:
        writer.write("weight", tensors["weight"])


WORKS: dict[str, Callable[[Given], Any]] = {
    "safe_open": lambda given: safe_open(given.many),
    "load_file": lambda given: load_file(given.path, backend="pread"),
    "load_file of another dtype": lambda given: load_file(given.path, dtype=torch.float16),
    "load": lambda given: load(given.data),
    "load_model": lambda given: load_model(given.model, given.path),
    "load_model by reads": lambda given: load_model(given.model, given.path, backend="pread"),
    "save": lambda given: save(given.tensors),
    "save_file": lambda given: save_file(given.tensors, given.saved),
    "IncrementalWriter": lambda given: write_one(given.saved, given.tensors),
    "edit_metadata": lambda given: edit_metadata(given.edited, {"nonce": str(time.monotonic())}),
    "get_tensor": lambda given: given.open.get_tensor("weight"),
    "get_tensors": lambda given: given.open.get_tensors(),
    "slice": lambda given: given.part[5:],
    "slice with steps": lambda given: given.part[5::2],
    "slice by a list": lambda given: given.part[[0, 5]],
    "File.get_tensor": lambda given: given.open._file().get_tensor("weight", CPU),
    "File.get_slice": lambda given: given.file.get_slice("weight", [5], [COUNT], [3], CPU),
    "ops.load_file": lambda given: ops.load_file(given.name, backend="pread"),
    "ops.load": lambda given: ops.load(torch.frombuffer(given.data, dtype=torch.uint8)),
    "ops.load_tensors": lambda given: ops.load_tensors(given.name, ["weight"], backend="pread"),
    "ops.get_slice": lambda given: ops.get_slice(given.name, "weight", [1], [COUNT]),
    "ops.save": lambda given: ops.save(given.tensors),
    "ops.save_file": lambda given: ops.save_file(given.tensors, str(given.saved)),
    "ops.save_tensors": lambda given: ops.save_tensors(str(given.saved), ["weight"], [given.tensors["weight"]]),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("gil") / "one")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("name", WORKS)
def test_other_threads_run_meanwhile(name: str, given: Given) -> None:
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
            result = WORKS[name](given)
            end = time.perf_counter()
            del result
            # Not at the start or the end, where Python code runs.
            edge = (end - start) / 5
            turns = max(turns, sum(start + edge < moment < end - edge for moment in ticks))
            if turns >= 3:
                return
        pytest.fail(f"no more than {turns} turns of another thread in a call of {end - start:.3f} s")
    finally:
        done.set()
        thread.join()
