"""Goes on, in Python, with the module that finetune.cpp trained, and leaves it to finetune.cpp again.

Run: python examples/cpp/finetune/finetune.py DIRECTORY [STEPS]    (after BUILD/finetune DIRECTORY)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from safetensors_torch import load_file, load_model, safe_open, save_file, save_model

# The names of save_optimizer and load_optimizer of C++.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Net(nn.Module):
    """The same names as in finetune.cpp, as a file knows parameters and buffers by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 64, bias=False)
        self.norm = nn.BatchNorm1d(64)
        self.output = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.norm(self.hidden(x))))


def evaluate(net: Net, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return nn.functional.mse_loss(net.eval()(x), y).item()


def save_optimizer(optimizer: torch.optim.Optimizer, net: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    tensors = {}
    for name, value in get_optimizer_state_dict(net, optimizer, options=FLAT).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is not None:  # `foreach`, and other options of Python alone
            tensors[name] = torch.tensor(value, dtype=None if isinstance(value, int) else torch.float64)
    metadata = {"optimizer": type(optimizer).__name__, **metadata}
    save_file(tensors, path, metadata=metadata, force_contiguous=True)


def load_optimizer(optimizer: torch.optim.Optimizer, net: nn.Module, path: Path) -> None:
    state = get_optimizer_state_dict(net, optimizer, options=FLAT)  # options that only Python has
    for name, tensor in load_file(path).items():
        state[name] = tensor if name.startswith("state.") else tensor.tolist()
    set_optimizer_state_dict(net, optimizer, state, options=FLAT)


def train(net: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()


def main() -> None:
    directory = Path(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    model_path = directory / "model.safetensors"
    optimizer_path = directory / "optimizer.safetensors"
    # The order of a summation may depend on the number of threads; finetune.cpp sets the same number.
    torch.set_num_threads(1)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    load_model(net, model_path)
    load_optimizer(optimizer, net, optimizer_path)
    data = load_file(directory / "data.safetensors")
    x, y = data["x"], data["y"]
    with safe_open(model_path) as model_file, safe_open(optimizer_path) as optimizer_file:
        recorded = float(model_file.metadata()["loss"])
        step = model_file.metadata()["step"]
        # The process may have been killed between the saves of the two files.
        if optimizer_file.metadata()["step"] != step:
            sys.exit(f"{optimizer_path}: it is of another step than {model_path}")

    before = evaluate(net, x, y)
    if before != recorded:
        sys.exit(f"{model_path}: its loss was {recorded}, not {before}")
    train(net, optimizer, x, y, steps)
    after = evaluate(net, x, y)
    print(f"Python  {steps} steps: loss {before:.6f} -> {after:.6f}")
    total = str(int(step) + steps)
    save_optimizer(optimizer, net, optimizer_path, {"step": total})
    save_model(net, model_path, metadata={"loss": repr(after), "step": total})


if __name__ == "__main__":
    main()
