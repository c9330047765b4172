"""Helpers of the tests: an encoder written from the format's description, dtypes by code, file permissions.

It does not call the package under test, so that no test compares the package with itself.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from random_state import flat_bytes

# All dtype codes of the format, in the order of a file.
CODES = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 "
    "F6_E3M2 F6_E2M3 F4 BOOL"
).split()
_TORCH_NAMES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "F4": "float4_e2m1fn_x2",
    "BOOL": "bool",
}
# The dtypes of the installed torch: older versions lack F8_E8M0 and F4, and all lack F6.
DTYPES = {code: getattr(torch, _TORCH_NAMES[code]) for code in CODES if hasattr(torch, _TORCH_NAMES.get(code, "-"))}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(flat_bytes(tensor).tolist())


def sample(dtype: torch.dtype, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    """Returns a tensor of any dtype, with distinct bytes if the dtype allows them."""
    count = torch.Size(shape).numel()
    raw = torch.arange(1, count * dtype.itemsize + 1).remainder(2 if dtype is torch.bool else 251)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def entry(code: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": code, "shape": shape, "data_offsets": [begin, end]}


def pack(header: dict, data: bytes = b"") -> bytes:
    """Returns a file: the length, the header as compact JSON padded to a multiple of 8, the data."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def unpack(blob: bytes) -> tuple[bytes, bytes]:
    """Returns the header with its padding, and the data."""
    (length,) = struct.unpack_from("<Q", blob)
    return blob[8 : 8 + length], blob[8 + length :]


def encode(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Returns the file of these tensors, from an independent implementation of the format."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    order = sorted(tensors, key=lambda name: (CODES.index(codes[tensors[name].dtype]), name.encode()))
    for name in order:
        code, raw, shape = codes[tensors[name].dtype], bits(tensors[name]), list(tensors[name].shape)
        if code == "F4":
            shape[-1] *= 2
        header[name] = entry(code, shape, len(data), len(data) + len(raw))
        data += raw
    return pack(header, data)


def groups_in(message: str) -> list[set[str]]:
    """Returns the list of sets of names in a message."""
    found = re.search(r"\[\{.*\}\]", message, re.DOTALL)
    assert found, f"no list of sets in {message!r}"
    return ast.literal_eval(found.group())


def aliases(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a copy of a model's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def entries(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def bytes_read() -> int:
    """Returns the bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Runs the body as a user to whom file permissions apply, unlike root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def as_bytes(data: torch.Tensor) -> bytes:
    """Converts a tensor of bytes, as an operator returns it, to bytes."""
    return bytes(data.tolist())


def as_tensor(data: bytes) -> torch.Tensor:
    """Converts bytes to the tensor that an operator takes."""
    return torch.tensor(list(data), dtype=torch.uint8)


class Tied(nn.Module):
    """A module whose head and embedding share a weight; save_model keeps the embedding's name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 7, bias=False)
        self.embedding = nn.Embedding(7, 4)
        self.embedding.weight = self.head.weight
        self.norm = nn.LayerNorm(4)
