"""The files that are loaded: their contents, written and read without the library.

Owns the parts of the format that checks and benchmark need, and the checksum of a file's data.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The names of the format and of torch. Older torch versions lack some.
_CODES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _CODES.items() if hasattr(torch, name)}
_CODE_OF = {dtype: code for code, dtype in DTYPES.items()}
# This dtype has two values in each byte.
PACKED = "F4"

Tensors = dict[str, torch.Tensor]

# How many bytes a checksum adds at a time; even.
_BUCKET = 16 << 20
# A prime, so that no shift of the data by a block size goes unnoticed.
_PRIME = 65521
_MODULUS = (1 << 61) - 1


@dataclass(frozen=True)
class Content:
    """The content of a file of the benchmark."""

    name: str
    title: str
    dtype: str  # its name in torch
    shapes: dict[str, tuple[int, ...]]

    def nbytes(self) -> int:
        """Returns the bytes of all tensors."""
        itemsize = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        return itemsize * sum(math.prod(shape) for shape in self.shapes.values())


def model(name: str, nbytes: int) -> Content:
    """Returns a language model of 32 layers in bfloat16, with about ``nbytes``."""
    # In squares of the width, an embedding and a head have 16 each, and a layer 13.
    width = max(8, round(math.sqrt(nbytes / 2 / (2 * 16 + 32 * 13)) / 8) * 8)
    inner, narrow = width * 7 // 2, width // 4
    shapes: dict[str, tuple[int, ...]] = {"embed": (16 * width, width)}
    for layer in range(32):
        prefix = f"layers.{layer}"
        shapes[f"{prefix}.attention.norm"] = (width,)
        for part, rows in (("q", width), ("k", narrow), ("v", narrow), ("o", width)):
            shapes[f"{prefix}.attention.{part}"] = (rows, width)
        shapes[f"{prefix}.mlp.norm"] = (width,)
        for part in ("gate", "up"):
            shapes[f"{prefix}.mlp.{part}"] = (inner, width)
        shapes[f"{prefix}.mlp.down"] = (width, inner)
    shapes["norm"] = (width,)
    shapes["head"] = (16 * width, width)
    content = Content(name, "", "bfloat16", shapes)
    return Content(name, f"a model of {len(shapes)} tensors, bfloat16", content.dtype, shapes)


def tiny(name: str, count: int) -> Content:
    """Returns ``count`` tensors of 256 bytes."""
    return Content(name, f"{count:,} tensors of 256 bytes, float32", "float32", {f"t.{i}": (64,) for i in range(count)})


def make(content: Content, path: Path) -> int:
    """Writes a file with random bits in its tensors, and returns their checksum."""
    dtype = getattr(torch, content.dtype)
    pool = torch.randint(0, 256, ((32 << 20) + 4099,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    checksum = _Checksum()
    itemsize = torch.empty((), dtype=dtype).element_size()
    sizes = {name: itemsize * math.prod(shape) for name, shape in content.shapes.items()}
    with open(path, "wb") as file:
        file.write(_header({name: (dtype, shape) for name, shape in content.shapes.items()}))
        for index, nbytes in enumerate(sizes.values()):
            start, left = 977 * index % (16 << 20), nbytes
            while left > 0:
                piece = pool[start : start + left]
                file.write(_memory(piece))
                checksum.add(piece)
                left -= len(piece)
                start = 0
    return checksum.result()


def write(path: Path, tensors: Tensors) -> Path:
    """Writes CPU tensors in the order of the dict, even if that leaves some unaligned to their dtype."""
    with open(path, "wb") as file:
        file.write(_header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}))
        for tensor in tensors.values():
            file.write(_memory(raw(tensor)))
    return path


def _header(entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    found: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        code = _CODE_OF[dtype]
        # The format counts values; torch's packed dtype counts bytes of two values.
        dims = [*shape[:-1], 2 * shape[-1]] if code == PACKED else list(shape)
        found[name] = {"dtype": code, "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous tensor as bytes that share its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _memory(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a one-dimensional CPU tensor of bytes, which must outlive it. Needs no numpy."""
    size = tensor.numel()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr()) if size else bytearray()).cast("B")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header entries of a file in the order of their data, and the offset of the data."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), 8 + length


def read(path: Path, order: list[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a file on the CPU, in the order of their data or of ``names``."""
    header, start = read_header(path)
    with open(path, "rb") as file:
        for name in header if order is None else order:
            code, dims = header[name]["dtype"], header[name]["shape"]
            begin, end = header[name]["data_offsets"]
            data = torch.empty(end - begin, dtype=torch.uint8)
            file.seek(start + begin)
            if file.readinto(_memory(data)) != end - begin:
                raise ValueError(f"{path} ends in the middle of {name}")
            shape = [*dims[:-1], dims[-1] // 2] if code == PACKED else dims
            yield name, data.view(DTYPES[code]).view(shape)


def names(path: Path) -> list[str]:
    """Returns the names of a file's tensors in the order of their data."""
    return list(read_header(path)[0])


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Returns a number that depends on every byte and its position, computed on the device of the tensors."""
    found = _Checksum()
    for tensor in tensors:
        found.add(raw(tensor))
    return found.result()


class _Checksum:
    """An incomplete checksum."""

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []
        self._filled = 0
        self._total = 0
        self._weights = torch.empty(0)

    def add(self, data: torch.Tensor) -> None:
        """Adds the bytes of a one-dimensional tensor."""
        while len(data) > 0:
            piece = data[: _BUCKET - self._filled]
            self._pieces.append(piece)
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == _BUCKET:
                self._take()

    def _take(self) -> None:
        if not self._pieces:
            return
        device = self._pieces[0].device
        if self._filled % 2 != 0:
            self._pieces.append(torch.zeros(1, dtype=torch.uint8, device=device))
        values = torch.cat(self._pieces).view(torch.int16).to(torch.int64)
        if len(self._weights) == 0:
            self._weights = (torch.arange(_BUCKET // 2) % _PRIME + 1).to(device)
        # At most 2**15 * 2**16 * 2**23: no overflow.
        part = int((values * self._weights[: len(values)]).sum())
        self._total = (self._total * _PRIME + part) % _MODULUS
        self._pieces, self._filled = [], 0

    def result(self) -> int:
        """Returns the checksum of all bytes added."""
        self._take()
        return self._total
