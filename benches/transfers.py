"""Measures what a transfer to a device costs the host besides the copies: small files, in every mode.

    python benches/transfers.py

Runs without a GPU, on the accelerator of the tests, with no delays and memory that takes a millisecond to pin for each
MiB. Its copies are memory copies by one thread, so the times say nothing of a bus: only the ratios between
the ways do, of what each does around the same copies. Each way takes its turn, and the medians of all rounds count.

- plain: no pinned memory at all
- first: as in a process that loads for the first time
- warm: with the pinned memory of the loads before
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "accelerator"))

import accelerator  # noqa: E402

accelerator.load()

import torch  # noqa: E402

import safetensors_torch as st  # noqa: E402

MB = 1_000_000
WAYS = ("plain", "first", "warm")


def files(directory: Path) -> dict[str, Path]:
    """Writes files of a few tensors each, and one of many small tensors."""
    made = {}
    for size in (1, 10, 50, 100, 200):
        count = max(4, size // 2)
        tensors = {f"{i}": torch.zeros(size * MB // count // 4) for i in range(count)}
        made[f"{size} MB"] = directory / f"{size}"
        st.save_file(tensors, made[f"{size} MB"])
    made["2,000 tensors of 256 B"] = directory / "many"
    st.save_file({f"layer.{i}": torch.zeros(64) for i in range(2000)}, made["2,000 tensors of 256 B"])
    return made


def seconds(path: Path, way: str) -> float:
    """Runs one load, until the device has all data."""
    st.set_transfer_options(pinned_pool_bytes=0 if way == "plain" else 64 << 20)
    if way == "first":
        st.release_transfer_memory()
    elif way == "warm":
        st.reserve_transfer_memory(64 << 20)
    accelerator.synchronize()
    begin = time.perf_counter()
    loaded = st.load_file(path, accelerator.device())
    accelerator.synchronize()
    end = time.perf_counter()
    del loaded
    return end - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    accelerator.set_delay(0)
    accelerator.pinning_cost(1000)
    with tempfile.TemporaryDirectory() as directory:
        print("| file | plain | first | warm | first / plain | warm / plain |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, path in files(Path(directory)).items():
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    times[way].append(seconds(path, way))
            plain, first, warm = (statistics.median(times[way]) for way in WAYS)
            cells = [f"{value * 1e3:.2f} ms" for value in (plain, first, warm)]
            print(f"| {name} | {' | '.join(cells)} | {first / plain:.2f} | {warm / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
