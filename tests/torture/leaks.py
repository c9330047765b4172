"""Ten thousand rounds of everything that loads or saves in Python: memory, descriptors, mappings and threads stay flat.

Run with a directory, where the package can be imported.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from safetensors_torch import (
    IncrementalWriter,
    SafetensorError,
    edit_metadata,
    load,
    load_file,
    load_model,
    load_sharded,
    safe_open,
    save,
    save_file,
    save_model,
    save_sharded,
)

ROUNDS, WARM_UP = 10_000, 1_000


class Figures(NamedTuple):
    """Of this process: kB in memory, descriptors, lines of its map, threads."""

    resident: int
    descriptors: int
    mappings: int
    threads: int


def figures() -> Figures:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    resident, threads = int(status["VmRSS"].split()[0]), int(status["Threads"])
    return Figures(resident, len(os.listdir("/proc/self/fd")), mappings, threads)


def one_round(number: int, directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = directory / "small.safetensors"
    save_file(tensors, path, metadata={"round": str(number)})
    loaded = load_file(path, backend="pread" if number % 2 else "mmap")
    if not torch.equal(loaded["a"], tensors["a"]):
        sys.exit(f"round {number}: another tensor")
    load(save(tensors))
    edit_metadata(path, {"round": f"{number} again"})
    with IncrementalWriter(directory / "streamed.safetensors", {"a": (torch.float32, (100,))}) as writer:
        writer.write("a", tensors["a"])
    with safe_open(path) as file:
        file.get_slice("a")[1:5]
    for wrong in ({"a": tensors["a"].to_sparse()}, {"a": 3}):
        with contextlib.suppress(ValueError):
            save_file(wrong, path)
            sys.exit("a wrong tensor was saved")
    for load_it in (load_file, safe_open):
        with contextlib.suppress(SafetensorError):
            load_it(directory / "torn")
            sys.exit("a torn file was loaded")


def some_models(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What takes longer, one round in ten."""
    model = torch.nn.Linear(3, 4)
    save_model(model, directory / "model.safetensors")
    load_model(model, directory / "model.safetensors")
    with contextlib.suppress(RuntimeError):
        load_model(torch.nn.Linear(4, 4), directory / "model.safetensors")
        sys.exit("a model of other shapes was loaded")
    save_sharded(tensors, directory / "sharded", max_shard_size=100)
    load_sharded(directory / "sharded")


def main(directory: Path) -> int:
    torch.set_num_threads(1)
    tensors = {"a": torch.arange(100.0), "b": torch.ones(3, 4, dtype=torch.int8)}
    directory.mkdir()
    (directory / "torn").write_bytes(b"\x40" + bytes(7) + b'{"a":')
    begun = time.monotonic()
    warm = figures()
    for number in range(ROUNDS):
        if number == WARM_UP:
            warm = figures()
        one_round(number, directory, tensors)
        if number % 10 == 0:
            some_models(directory, tensors)
    after = figures()
    flat = (
        after.resident <= warm.resident + 1024
        and after.descriptors <= warm.descriptors
        and after.mappings <= warm.mappings + 4
        and after.threads <= warm.threads
    )
    print(
        f"leaks in Python: {ROUNDS} rounds in {time.monotonic() - begun:.1f} s; kB in memory {warm.resident}, then "
        f"{after.resident}; descriptors {warm.descriptors}, {after.descriptors}; mappings {warm.mappings}, "
        f"{after.mappings}; threads {warm.threads}, {after.threads}{'' if flat else '; NOT FLAT'}"
    )
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) / "python"))
