"""The data sets: names, shapes and dtypes, and the files made of them.

Owns their contents, and how they are written and read without this library: the reference writes the files, and
`read_tensors` reads them with plain Python. works.py uses them.

Run: python data.py SET DIRECTORY    writes DIRECTORY/SET.safetensors and, if works need it, DIRECTORY/SET.pt.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from places import LATENCY_MS, STREAM_MB

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class DataSet:
    """A set of tensors of one dtype."""

    title: str
    dtype: str  # its name in torch
    element_bytes: int
    shapes: Callable[[], Shapes]
    pickled: bool = True  # whether a .pt exists beside the .safetensors
    most_rounds: int = 1000  # fewer if a run takes seconds
    place: str = "disk"  # where its file lies, see places.py

    def nbytes(self) -> int:
        """Returns the bytes of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes().values()) * self.element_bytes

    def half_bytes(self) -> int:
        """Returns the bytes of the first half of each tensor along its first dimension."""
        halves = (math.prod((shape[0] // 2, *shape[1:])) for shape in self.shapes().values())
        return sum(halves) * self.element_bytes


def _small(count: int) -> Shapes:
    return {f"model.layers.{index}.weight": (64,) for index in range(count)}


def _gpt2() -> Shapes:
    """Returns the shapes of GPT-2 small, in the order of its checkpoint: 12 layers."""
    width = 768

    def both(name: str, *shape: int) -> Shapes:
        return {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}

    shapes: Shapes = {"transformer.wte.weight": (50257, width), "transformer.wpe.weight": (1024, width)}
    for layer in range(12):
        prefix = f"transformer.h.{layer}"
        shapes |= both(f"{prefix}.ln_1", width)
        shapes |= both(f"{prefix}.attn.c_attn", width, 3 * width)
        shapes |= both(f"{prefix}.attn.c_proj", width, width)
        shapes |= both(f"{prefix}.ln_2", width)
        shapes |= both(f"{prefix}.mlp.c_fc", width, 4 * width)
        shapes |= both(f"{prefix}.mlp.c_proj", 4 * width, width)
    return shapes | both("transformer.ln_f", width)


def _shard() -> Shapes:
    """Returns the shapes of a large model's first shard: a vocabulary of 64,000 and 8 layers of 9 tensors."""
    width, inner = 4096, 11008
    shapes: Shapes = {"model.embed_tokens.weight": (64000, width)}
    for layer in range(8):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes


DATA_SETS = {
    "small": DataSet("20,000 tensors of 256 bytes, float32", "float32", 4, lambda: _small(20_000)),
    "gpt2": DataSet("the tensors of GPT-2 small, float32", "float32", 4, _gpt2),
    "shard": DataSet("a shard of a language model, bfloat16", "bfloat16", 2, _shard, most_rounds=3),
    "million": DataSet(
        "a million tensors of 256 bytes", "float32", 4, lambda: _small(1_000_000), pickled=False, most_rounds=3
    ),
    "network": DataSet(
        f"the tensors of GPT-2 small on a network filesystem, {LATENCY_MS} ms a request, {STREAM_MB} MB/s a stream",
        "float32",
        4,
        _gpt2,
        pickled=False,
        most_rounds=2,
        place="network",
    ),
    "loop": DataSet(
        "the shard on a loop device over memory", "bfloat16", 2, _shard, pickled=False, most_rounds=15, place="loop"
    ),
}


def make(name: str, directory: Path) -> None:
    """Writes the files of the data set `name`, with the same numbers each time."""
    import safetensors.torch
    import torch

    data = DATA_SETS[name]
    torch.manual_seed(0)
    # Enough numbers that no two tensors are equal; new ones for each tensor would take a minute.
    numbers = torch.randn(1 << 24).to(getattr(torch, data.dtype))
    tensors = {}
    for index, (key, shape) in enumerate(data.shapes().items()):
        count, start = math.prod(shape), 97 * index % (1 << 23)
        if count <= 1 << 23:
            values = numbers[start : start + count].clone()
        else:
            values = numbers.repeat(-(-count // len(numbers)))[:count].clone()
        tensors[key] = values.reshape(shape)
    safetensors.torch.save_file(tensors, directory / f"{name}.safetensors")
    if data.pickled:
        torch.save(tensors, directory / f"{name}.pt")


def read_header(path: Path) -> tuple[dict, int]:
    """Returns the tensors in the header of a safetensors file, and the offset of the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def read_tensors(path: Path, names: set[str] | None = None) -> dict:
    """Returns the tensors of a file (only `names`, if given), each in its own memory."""
    import torch

    header, start = read_header(path)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    tensors = {}
    with path.open("rb") as file:
        for name, entry in header.items():
            if names is None or name in names:
                tensor = torch.empty(entry["shape"], dtype=dtypes[entry["dtype"]])
                file.seek(start + entry["data_offsets"][0])
                file.readinto(tensor.view(-1).view(torch.uint8).numpy())
                tensors[name] = tensor
    return tensors


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
