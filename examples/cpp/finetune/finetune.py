"""Goes on, in Python, with the module that finetune.cpp trained, and leaves it to finetune.cpp again.

Run: python examples/cpp/finetune/finetune.py DIRECTORY    (after BUILD/finetune DIRECTORY)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from safetensors_torch import load_file, load_model, safe_open, save_model

STEPS = 200


class Net(nn.Module):
    """The same names as in finetune.cpp, as a file knows parameters and buffers by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 64)
        self.norm = nn.BatchNorm1d(64)
        self.output = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.norm(self.hidden(x))))


def evaluate(net: Net, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return nn.functional.mse_loss(net.eval()(x), y).item()


def train(net: Net, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    net.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()


def main() -> None:
    directory = Path(sys.argv[1])
    model_path = directory / "model.safetensors"
    # The order of a summation may depend on the number of threads; finetune.cpp sets the same number.
    torch.set_num_threads(1)
    net = Net()
    load_model(net, model_path)
    data = load_file(directory / "data.safetensors")
    x, y = data["x"], data["y"]
    with safe_open(model_path) as file:
        recorded = float(file.metadata()["loss"])

    before = evaluate(net, x, y)
    if before != recorded:
        sys.exit(f"{model_path}: its loss was {recorded}, not {before}")
    train(net, x, y)
    after = evaluate(net, x, y)
    print(f"Python  {STEPS} steps: loss {before:.6f} -> {after:.6f}")
    save_model(net, model_path, metadata={"loss": repr(after)})


if __name__ == "__main__":
    main()
