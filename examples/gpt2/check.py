"""Checks the file that forward.cpp wrote, then compares the speed with the reference package.

Run:  python check.py DIRECTORY        (after make_model.py DIRECTORY and forward DIRECTORY)

Compares every tensor with weights that are drawn again from the seed. The last part is skipped unless the PyPI package
`safetensors` is installed. The exit status is 0 if there is no difference.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from make_model import METADATA, build, different_tensors, duration, megabytes, report, tied_names

import safetensors_torch

ROUNDS = 3


def first_difference(a: Path, b: Path) -> int | None:
    """Returns the offset of the first byte that differs, or None."""
    chunk, offset = 1 << 23, 0
    with open(a, "rb") as left, open(b, "rb") as right:
        while True:
            x, y = left.read(chunk), right.read(chunk)
            if x != y:
                return offset + len(os.path.commonprefix([x, y]))
            if not x:
                return None
            offset += len(x)


def header_size(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def compare_files(ours: Path, original: Path) -> None:
    """Checks that both files have the same bytes: the same tensors and, because forward.cpp copies it, metadata."""
    start = time.perf_counter()
    offset = first_difference(ours, original)
    elapsed = time.perf_counter() - start
    if offset is not None:
        where = (
            "the tensors' data"
            if offset >= header_size(original)
            else "the header (other metadata, or another order of tensors)"
        )
        sys.exit(f"{ours} and {original} differ at byte {offset}, in {where}")
    what = f"{ours.name} and {original.name}: the same bytes"
    report("compare", what, ours.stat().st_size, elapsed)


def measure(call: Callable[[Any], Any], *libraries: Any) -> list[float]:
    """Returns the best time of each library. They take turns, in alternating order, so that disturbances and
    after-effects affect all of them."""
    times: list[list[float]] = [[] for _ in libraries]
    for number in range(ROUNDS):
        order = list(zip(libraries, times, strict=True))
        for library, own in order if number % 2 else reversed(order):
            start = time.perf_counter()
            result = call(library)
            own.append(time.perf_counter() - start)
            del result
    return [min(own) for own in times]


def beside_the_reference(path: Path, directory: Path, model: torch.nn.Module) -> None:
    import safetensors
    import safetensors.torch as reference

    size = path.stat().st_size
    state = safetensors_torch.load_file(path)
    data = path.read_bytes()
    # Each library replaces its own file, so each pays for the old file that it wrote.
    scratch = {library: directory / f"scratch.{library.__name__}" for library in (safetensors_torch, reference)}
    work: dict[str, Callable[[Any], Any]] = {
        "load_file, mapped": lambda library: library.load_file(path),
        "load_file, read": lambda library: library.load_file(path, backend="pread"),
        "load_model": lambda library: library.load_model(model, path),
        "load, from bytes": lambda library: library.load(data),
        "save_file, over an old one": lambda library: library.save_file(state, scratch[library], METADATA),
        "save, to bytes": lambda library: library.save(state, METADATA),
    }
    print(
        f"\n  {megabytes(size)}, {len(state)} tensors, page cache warm, best of {ROUNDS}\n"
        f"  {'':<28}{'safetensors_torch':>18}{'safetensors ' + safetensors.__version__:>20}{'ratio':>9}"
    )
    try:
        for name, call in work.items():
            ours, theirs = measure(call, safetensors_torch, reference)
            print(f"  {name:<28}{duration(ours):>18}{duration(theirs):>20}{theirs / ours:>8.1f}x", flush=True)
    finally:
        for file in scratch.values():
            file.unlink(missing_ok=True)


def main() -> None:
    directory = Path(sys.argv[1])
    original, ours = directory / "model.safetensors", directory / "from_cpp.safetensors"

    start = time.perf_counter()
    state = torch.ops.safetensors_torch.load_file(os.fspath(ours))
    elapsed = time.perf_counter() - start
    report("torch.ops", f"load_file of {ours.name}: {len(state)} tensors", ours.stat().st_size, elapsed)

    model = build()
    ties = tied_names(ours)
    state.update({dropped: state[kept] for dropped, kept in ties.items()})
    start = time.perf_counter()
    if different := different_tensors(state, model):
        sys.exit(f"{ours}: not the weights of the seed: {', '.join(different)}")
    elapsed = time.perf_counter() - start
    what = f"{len(state)} names: the same bits as weights drawn again from the seed"
    report("compare", what, sum(parameter.nbytes for parameter in model.parameters()), elapsed)
    compare_files(ours, original)

    if importlib.util.find_spec("safetensors") is None:
        print("\n  The package safetensors is not installed: comparison skipped.")
        return
    import safetensors.torch as reference

    start = time.perf_counter()
    state = reference.load_file(ours)
    elapsed = time.perf_counter() - start
    state.update({dropped: state[kept] for dropped, kept in ties.items()})
    if different := different_tensors(state, model):
        sys.exit(f"{ours}: safetensors reads different weights: {', '.join(different)}")
    report("safetensors", "the reference package reads the same bits from it", ours.stat().st_size, elapsed)
    beside_the_reference(ours, directory, model)


if __name__ == "__main__":
    main()
