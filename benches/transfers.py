"""Measures what a transfer to a device costs the host besides the copies: small files, in every mode.

    python benches/transfers.py

Runs without a GPU, on the accelerator of the tests, without delays, and with a millisecond to pin each MiB. One thread
copies memory, so the times do not describe a bus. Compare the ratios between the modes only, which do different work
around the same copies. The modes take turns, and the medians of all rounds count.

- plain: no pinned memory
- first: the first load of a process
- warm: with the pinned memory of earlier loads
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
