"""Saves, loads and inspects a file of tensors.

Run: .venv/bin/python examples/python/quickstart.py [FILE]    (after `make build`)
"""

from __future__ import annotations

import sys

import torch

import safetensors_torch as st

path = sys.argv[1] if len(sys.argv) > 1 else "quickstart.safetensors"

st.save_file({"weight": torch.randn(3, 4), "bias": torch.zeros(3)}, path, metadata={"made by": "quickstart"})

tensors = st.load_file(path)
for name, tensor in tensors.items():
    print(f"{name:8} {str(tensor.dtype):14} {tuple(tensor.shape)}")

with st.safe_open(path) as file:
    print("metadata", file.metadata())
    print("first row of weight", file.get_slice("weight")[0])

# The same file through an operator, as TorchScript and compiled programs call it.
bias = torch.ops.safetensors_torch.get_tensor(path, "bias")
assert torch.equal(bias, tensors["bias"])

model = torch.nn.Linear(4, 3)
missing, unexpected = st.load_model(model, path)
assert not missing and not unexpected
assert torch.equal(model.weight, tensors["weight"])
print("loaded into", model)
