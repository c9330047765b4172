"""Ten thousand loads and saves from Python: memory, descriptors, mappings and threads stay what they were.

Run with a folder, where the package can be imported.
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

from safetensors_torch import SafetensorError, load, load_file, safe_open, save, save_file

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


def one_round(number: int, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "small.safetensors"
    save_file(tensors, path, metadata={"round": str(number)})
    loaded = load_file(path, backend="pread" if number % 2 else "mmap")
    if not torch.equal(loaded["a"], tensors["a"]):
        sys.exit(f"round {number}: another tensor")
    load(save(tensors))
    with safe_open(path) as file:
        file.get_slice("a")[1:5]
    for wrong in ({"a": tensors["a"].to_sparse()}, {"a": 3}):
        with contextlib.suppress(ValueError):
            save_file(wrong, path)
            sys.exit("a wrong tensor was saved")
    with contextlib.suppress(SafetensorError):
        load_file(folder / "torn")
        sys.exit("a torn file was loaded")


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    tensors = {"a": torch.arange(100.0), "b": torch.ones(3, 4, dtype=torch.int8)}
    (folder / "torn").write_bytes(b"\x40" + bytes(7) + b'{"a":')
    begun = time.monotonic()
    warm = figures()
    for number in range(ROUNDS):
        if number == WARM_UP:
            warm = figures()
        one_round(number, folder, tensors)
    after = figures()
    flat = (
        after.resident <= warm.resident + 4096
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
    sys.exit(main(Path(sys.argv[1])))
