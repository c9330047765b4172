"""Times this library beside the reference `safetensors`, in turn, in one run, with the page cache hot.

Run: make bench    or    .venv/bin/python benches/bench.py [--runs N] [--folder DIR] [--quick]

Prints the median of each, and the ratio reference / ours. These are figures of the machine that ran it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch as reference
import torch

import safetensors_torch as ours

Work = Callable[[], object]


def small_tensors(count: int) -> dict[str, torch.Tensor]:
    """Tensors of 256 bytes."""
    return {f"model.layers.{index}.weight": torch.full((64,), float(index)) for index in range(count)}


def gpt2_tensors(layers: int) -> dict[str, torch.Tensor]:
    """The shapes of GPT-2 small, with that many layers."""
    width = 768
    shapes = {"wte": (50257, width), "wpe": (1024, width)}
    for layer in range(layers):
        shapes |= {
            f"h.{layer}.attn.c_attn": (width, 3 * width),
            f"h.{layer}.attn.c_proj": (width, width),
            f"h.{layer}.mlp.c_fc": (width, 4 * width),
            f"h.{layer}.mlp.c_proj": (4 * width, width),
        }
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def cases(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, tuple[Work, Work]]:
    """What is timed: its name, ours, the reference's."""
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    ours.save_file(tensors, source)
    data = source.read_bytes()
    return {
        "load_file mmap": (lambda: ours.load_file(source), lambda: reference.load_file(source)),
        "load_file pread": (
            lambda: ours.load_file(source, backend="pread"),
            lambda: reference.load_file(source, backend="pread"),
        ),
        "load": (lambda: ours.load(data), lambda: reference.load(data)),
        "save": (lambda: ours.save(tensors), lambda: reference.save(tensors)),
        "save_file, replacing": (
            lambda: ours.save_file(tensors, target),
            lambda: reference.save_file(tensors, target),
        ),
    }


def seconds(work: Work) -> float:
    start = time.perf_counter()
    result = work()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each")
    parser.add_argument("--folder", help="where the files go; a temporary folder otherwise")
    parser.add_argument("--quick", action="store_true", help="a fifth of the tensors")
    arguments = parser.parse_args()
    scale = 5 if arguments.quick else 1
    sets = {
        f"{20_000 // scale:,} tensors of 256 bytes": small_tensors(20_000 // scale),
        "GPT-2 shapes": gpt2_tensors(12 // scale),
    }
    print(f"{'work':22} {'ours ms':>9} {'reference ms':>13} {'ratio':>6}")
    for title, tensors in sets.items():
        megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        print(f"\n{title} ({megabytes:.0f} MB)")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for name, (mine, theirs) in cases(tensors, Path(folder)).items():
                mine(), theirs()
                pairs = [(seconds(mine), seconds(theirs)) for _ in range(arguments.runs)]
                a, b = (1e3 * statistics.median(column) for column in zip(*pairs))
                print(f"{name:22} {a:9.1f} {b:13.1f} {b / a:6.1f}")


if __name__ == "__main__":
    main()
