"""Makes what torchscript.cpp runs: a scripted module that reads safetensors files while it runs, and those files.

Run: python examples/cpp/torchscript/make_module.py DIRECTORY

DIRECTORY/module.pt              the scripted module; its weights are zero
DIRECTORY/model.safetensors      its weights
DIRECTORY/adapter-*.safetensors  low-rank changes of its weight, one of which a call names
DIRECTORY/expected.safetensors   an input, and what the module makes of it with each adapter
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from safetensors_torch import save_file, save_model

WIDTH, RANK = 32, 4


class Adapted(nn.Module):
    """A layer, and an adapter whose file is named when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        scale = torch.ops.safetensors_torch.get_tensor(adapter, "scale")
        factors = torch.ops.safetensors_torch.load_file(adapter)
        return self.base(x) + scale * (x @ factors["down"] @ factors["up"])


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2019)
    # The order of a summation may depend on the number of threads; torchscript.cpp sets the same number.
    torch.set_num_threads(1)

    module = torch.jit.script(Adapted().eval().requires_grad_(False))
    save_model(module, directory / "model.safetensors")
    expected = {"x": torch.randn(8, WIDTH)}
    for name, scale in ("first", 0.5), ("second", 2.0):
        adapter = directory / f"adapter-{name}.safetensors"
        factors = {"down": torch.randn(WIDTH, RANK), "up": torch.randn(RANK, WIDTH), "scale": torch.tensor(scale)}
        save_file(factors, adapter)
        expected[name] = module(expected["x"], str(adapter))
    save_file(expected, directory / "expected.safetensors")

    # The weights come only from model.safetensors.
    for parameter in module.parameters():
        parameter.zero_()
    module.save(directory / "module.pt")


if __name__ == "__main__":
    main()
