"""Random state dicts, one for each seed, and the comparison of tensors bit by bit.

It saves and loads nothing.
"""

from __future__ import annotations

import dataclasses
import json
import random
import struct

import torch

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
]

ODD_NAMES = [
    "",
    " ",
    ".",
    "..",
    "layers.0.self_attn.q_proj.weight",
    "/etc/passwd",
    'quote"inside',
    "back\\slash",
    "\\u0061",
    "new\nline\r\ttab",
    "\0",
    "\x08\x0c\x1b\x1f",
    "\x7f",
    "\x80\x9f",
    "\u00e9 e\u0301",
    "\u2028\u2029",
    "\ufeff",
    "\ufffd\uffff",
    "\U0001f600\U0001f468\u200d\U0001f469",
    "\U0010ffff",
    "{}[]:,",
    "null",
    "__metadata",
    "__METADATA__",
    "x" * 3000,
    "\u00df" * 700,
]


@dataclasses.dataclass(frozen=True)
class State:
    seed: int
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] | None


def random_state(seed: int) -> State:
    """Returns up to 12 tensors of any dtype and kind that a file can hold, with random bits, such as NaNs."""
    rng = random.Random(seed)
    tensors: dict[str, torch.Tensor] = {}
    for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 8, 12])):
        tensor = random_tensor(rng, rng.choice(DTYPES))
        if rng.random() < 0.1:
            tensors.update(halves(rng, tensor))
        else:
            tensors[random_name(rng)] = wrapped(rng, tensor)
    choices = [None, {random_text(rng): random_text(rng)}, {rng.choice(ODD_NAMES): rng.choice(ODD_NAMES)}]
    # The reference writes broken JSON for an empty metadata object with no tensor beside it.
    if tensors:
        choices.append({})
    return State(seed, tensors, rng.choice(choices))


def random_tensor(rng: random.Random, dtype: torch.dtype) -> torch.Tensor:
    rank = rng.choice([0, 1, 1, 2, 2, 3, 4, 6])
    # Two F4 values share a byte, so the format has no F4 scalar.
    if dtype is torch.float4_e2m1fn_x2:
        rank = max(rank, 1)
    shape = [rng.choice([0, 1, 1, 2, 3, 5] if rank > 2 else [0, 1, 2, 3, 7, 33]) for _ in range(rank)]
    count = 1
    for dim in shape:
        count *= dim
    raw = bytearray(rng.randbytes(count * dtype.itemsize))
    if dtype is torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).clone().view(dtype).reshape(shape)


def halves(rng: random.Random, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns two disjoint views of one storage, which a save accepts."""
    dtype = tensor.dtype
    flat = flat_bytes(tensor)
    middle = flat.numel() // dtype.itemsize // 2 * dtype.itemsize
    return {random_name(rng): flat[:middle].view(dtype), random_name(rng): flat[middle:].view(dtype)}


def wrapped(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor, perhaps as a parameter, or with unusual strides that are still contiguous."""
    kind = rng.choice(["plain", "plain", "parameter", "column"])
    if kind == "parameter":
        # float8 and float4 cannot require grad: torch lacks the operators to accumulate it.
        grad = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        return torch.nn.Parameter(tensor, requires_grad=grad)
    if kind == "column" and tensor.dim() > 0:
        return tensor.unsqueeze(0).transpose(0, 1)
    return tensor


def random_name(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(ODD_NAMES)
    return random_text(rng)


def random_text(rng: random.Random) -> str:
    limits = [0x7F, 0x2FF, 0x2FFF, 0x10FFFF]
    points = (rng.randint(0, rng.choice(limits)) for _ in range(rng.randint(0, 24)))
    return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the elements in row-major order as a uint8 tensor, so that NaNs compare equal."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def difference(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str | None:
    """Returns the first difference between `got` and `expected` in any order, or None if they are equal."""
    if got.keys() != expected.keys():
        return f"names differ: {sorted(got.keys() ^ expected.keys())!a}"
    for name, tensor in got.items():
        wanted = expected[name]
        if type(tensor) is not torch.Tensor or tensor.requires_grad:
            return f"{name!a} is no plain tensor without grad: {type(tensor)}"
        if tensor.dtype != wanted.dtype:
            return f"{name!a} is {tensor.dtype}, expected {wanted.dtype}"
        if tensor.shape != wanted.shape:
            return f"{name!a} has shape {list(tensor.shape)}, expected {list(wanted.shape)}"
        if not tensor.is_contiguous():
            return f"{name!a} has strides {tensor.stride()} for shape {list(tensor.shape)}"
        if not torch.equal(flat_bytes(tensor), flat_bytes(wanted)):
            return f"{name!a} has other bits"
    return None


def offset_order(data: bytes) -> list[str]:
    """Returns the names in a file's offset order, ties by name, from its header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: (header[name]["data_offsets"], name.encode()))
