"""A few small loads and saves, for a tool that checks every memory access.

Run: python sanitized.py DEVICE DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import data
import safetensors_torch
from checking import MIB, demand, demand_same, numbers, random


def main() -> None:
    device, path = torch.device(sys.argv[1]), Path(sys.argv[2]) / "model.safetensors"
    tensors = {f"t.{index}": numbers((MIB // 2 + index,), seed=index) for index in range(4)}
    tensors.update((f"small.{index}", random((index,), torch.uint8, index)) for index in range(20))
    data.write(path, tensors)
    for pool in (16 * MIB, 0):
        safetensors_torch.set_transfer_options(pinned_pool_bytes=pool)
        safetensors_torch.reserve_transfer_memory(pool)
        loaded = safetensors_torch.load_file(path, device)
        demand_same(loaded, tensors, device, "load_file")
        demand(safetensors_torch.save(loaded) == safetensors_torch.save(tensors), "save: other bytes")
        halves = safetensors_torch.load_file(path, device, dtype=torch.float16)
        demand(all(torch.equal(halves[f"t.{i}"].cpu(), tensors[f"t.{i}"].half()) for i in range(4)), "dtype=")
        with safetensors_torch.safe_open(path, "pt", device) as file:
            demand(torch.equal(file.get_slice("t.1")[5::7].cpu(), tensors["t.1"][5::7]), "get_slice")
    safetensors_torch.release_transfer_memory()


if __name__ == "__main__":
    main()
