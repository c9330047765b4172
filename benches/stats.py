"""Times `safetensors-torch stats` and `view --stats` beside a loop with torch over the reference's safe_open.

Run: .venv/bin/python benches/stats.py [--rounds N] [--bytes N] [--dtype BF16] [--directory DIRECTORY]

The file is in the page cache. Each run is a fresh process, from its start to its end, with the imports. The subjects
take turns. A first run of each, on a small file, is not counted. All compute minimum, maximum, mean and standard
deviation, and the numbers of zeros, NaN and Inf, of each tensor; the pages of view have histograms, too. One loop
computes mean and deviation in the dtype of the tensor, whose precision the results then have. The other one converts
the tensor to F64 first, which is as exact as ours.

peak: the most resident memory of the process, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import machine

LOOP = """
import sys, torch
from safetensors import safe_open
with safe_open(sys.argv[1], framework="pt") as file:
    for name in file.keys():
        tensor = file.get_tensor(name)
        wide = tensor.double() if sys.argv[2] == "exact" else tensor
        values = [tensor.min(), tensor.max(), wide.mean(), wide.std(), (tensor == 0).sum(), tensor.isnan().sum()]
        print(name, *[value.item() for value in values], tensor.isinf().sum().item())
"""
OURS = "from _safetensors_torch_start import shell_command; raise SystemExit(shell_command())"
SUBJECTS = {
    "safetensors-torch stats": ["-c", OURS, "stats", "{path}"],
    "... view --stats": ["-c", OURS, "view", "{path}", "--stats", "-o", "{path}.html", "--force"],
    "torch": ["-c", LOOP, "{path}", "native"],
    "torch, in F64": ["-c", LOOP, "{path}", "exact"],
}
# A layer of a model with about 64 million parameters, and small tensors beside it.
SHAPES = ([4096, 4096], [4096], [11008, 4096], [11008], [256])
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


class Run(NamedTuple):
    """One process: its seconds, and the most memory that it held."""

    seconds: float
    peak: float


def make(path: Path, code: str, nbytes: int) -> None:
    """Writes layers of normally distributed weights, until the file has about ``nbytes`` bytes."""
    import torch

    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[code]
    most = max(torch.Size(shape).numel() for shape in SHAPES)
    values = bytes(
        (torch.randn(most, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype).view(torch.uint8).numpy()
    )
    header, end, layer = {}, 0, 0
    while end < nbytes:
        for number, shape in enumerate(SHAPES):
            size = torch.Size(shape).numel() * WIDTHS[code]
            header[f"layers.{layer}.{number}"] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        layer += 1
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in header.values():
            begin, stop = entry["data_offsets"]
            file.write(values[: stop - begin])


def write(path: Path, code: str, nbytes: int) -> None:
    """Calls make in another process: a peak begins with that of the parent, which must not import torch."""
    writer = multiprocessing.get_context("spawn").Process(target=make, args=(path, code, nbytes))
    writer.start()
    writer.join()
    if writer.exitcode != 0:
        raise SystemExit(f"writing {path} failed")


def run(arguments: list[str], path: Path) -> Run:
    command = [sys.executable, *(argument.replace("{path}", str(path)) for argument in arguments)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return Run(seconds, usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=4 << 30, help="the size of the file (default: %(default)s)")
    parser.add_argument("--dtype", choices=WIDTHS, action="append", help="default: BF16 and F32")
    parser.add_argument("--directory", type=Path, help="where to write the file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        print(*(f"{name}: {value}" for name, value in machine.describe(Path(directory)).items()), sep=", ")
        path = Path(directory, "model.safetensors")
        for code in options.dtype or ("BF16", "F32"):
            write(path, code, 1 << 20)
            for arguments in SUBJECTS.values():
                run(arguments, path)
            write(path, code, options.bytes)
            machine.warm(path)
            runs: dict[str, list[Run]] = {subject: [] for subject in SUBJECTS}
            for _ in range(options.rounds):
                for subject, arguments in SUBJECTS.items():
                    runs[subject].append(run(arguments, path))
            ours = statistics.median(one.seconds for one in runs["safetensors-torch stats"])
            print(f"{code}, {path.stat().st_size / 1e9:.2f} GB, medians of {options.rounds}:")
            for subject, several in runs.items():
                seconds = statistics.median(one.seconds for one in several)
                peak = max(one.peak for one in several)
                print(f"  {subject:24} {seconds:7.2f} s  ratio {seconds / ours:5.2f}  peak {peak / 1e6:6.0f} MB")


if __name__ == "__main__":
    main()
