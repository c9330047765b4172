"""load: every kind of buffer, and the memory of the tensors with and without a copy."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from random_state import difference
from safetensors_torch import load, load_file, save
from support import DTYPES, encode, entry, pack, sample


def mapped(data: bytes, directory: Path, access: int) -> mmap.mmap:
    """A mapping of a file that is closed."""
    path = directory / "mapped"
    path.write_bytes(data)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def read_only_array(data: bytes, directory: Path) -> np.ndarray:
    result = np.frombuffer(bytearray(data), dtype=np.uint8)
    result.flags.writeable = False
    return result


def of_words(data: bytes, directory: Path) -> array.array:
    assert len(data) % 4 == 0
    return array.array("I", data)


READ_ONLY = {
    "bytes": lambda data, directory: data,
    "memoryview of bytes": lambda data, directory: memoryview(data),
    "read-only memoryview": lambda data, directory: memoryview(bytearray(data)).toreadonly(),
    "read-only mmap": lambda data, directory: mapped(data, directory, mmap.ACCESS_READ),
    "read-only numpy": read_only_array,
}
WRITABLE = {
    "bytearray": lambda data, directory: bytearray(data),
    "memoryview": lambda data, directory: memoryview(bytearray(data)),
    "private mmap": lambda data, directory: mapped(data, directory, mmap.ACCESS_COPY),
    "shared mmap": lambda data, directory: mapped(data, directory, mmap.ACCESS_WRITE),
    "numpy": lambda data, directory: np.frombuffer(bytearray(data), dtype=np.uint8),
    "numpy of two dimensions": lambda data, directory: np.frombuffer(bytearray(data), dtype=np.uint16).reshape(2, -1),
    "array of words": of_words,
    "ctypes": lambda data, directory: (ctypes.c_char * len(data)).from_buffer_copy(data),
    "slice of a memoryview": lambda data, directory: memoryview(bytearray(64) + data + bytes(3))[64:-3],
}
every_buffer = pytest.mark.parametrize("make", {**READ_ONLY, **WRITABLE}.values(), ids={**READ_ONLY, **WRITABLE})
writable_buffer = pytest.mark.parametrize("make", WRITABLE.values(), ids=WRITABLE)
read_only_buffer = pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY)


def contents(buffer: object) -> bytes:
    return bytes(memoryview(buffer).cast("B"))


def fill(buffer: object, data: bytes) -> None:
    memoryview(buffer).cast("B")[:] = data


@pytest.fixture
def blob() -> bytes:
    """Data whose length is a multiple of 4, so that a buffer of words can hold it."""
    return encode({"ones": torch.ones(4), "steps": torch.arange(3), "flags": torch.tensor([True, False, True, True])})


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return {"ones": torch.ones(4), "steps": torch.arange(3), "flags": torch.tensor([True, False, True, True])}


@every_buffer
def test_buffer_kinds(make: Callable, blob: bytes, expected: dict, tmp_path: Path) -> None:
    loaded = load(make(blob, tmp_path))
    assert type(loaded) is dict
    assert list(loaded) == ["steps", "ones", "flags"]
    assert difference(loaded, expected) is None


def test_strided_buffer_is_never_misread(blob: bytes, expected: dict) -> None:
    spread = bytearray(2 * len(blob))
    spread[::2] = blob
    try:
        loaded = load(memoryview(spread)[::2])
    except (BufferError, TypeError, ValueError):
        return
    assert difference(loaded, expected) is None


@pytest.mark.parametrize("data", ["text", None, 3, [1, 2], {"a": 1}], ids=str)
def test_other_objects_are_type_errors(data: object) -> None:
    with pytest.raises(TypeError):
        load(data)


@writable_buffer
@pytest.mark.parametrize("options", [{}, {"copy": True}], ids=["default", "copy"])
def test_result_is_independent_of_the_input(
    make: Callable, options: dict, blob: bytes, expected: dict, tmp_path: Path
) -> None:
    buffer = make(blob, tmp_path)
    loaded = load(buffer, **options)
    fill(buffer, bytes(len(blob)))
    assert difference(loaded, expected) is None
    for tensor in loaded.values():
        tensor.zero_()
    fill(buffer, blob)
    for tensor in loaded.values():
        tensor.logical_not_()
    assert contents(buffer) == blob


@read_only_buffer
def test_bytes_never_change(make: Callable, blob: bytes, expected: dict, tmp_path: Path) -> None:
    buffer = make(blob, tmp_path)
    for tensor in load(buffer).values():
        tensor.zero_()
    assert contents(buffer) == blob
    assert difference(load(buffer), expected) is None


def test_two_calls_never_alias(blob: bytes, expected: dict) -> None:
    first, second = load(blob), load(blob)
    for tensor in first.values():
        tensor.zero_()
    assert difference(second, expected) is None


def test_copies_outlive_the_input(blob: bytes, expected: dict) -> None:
    buffer = bytearray(blob)
    loaded = load(buffer)
    buffer.clear()
    del buffer
    gc.collect()
    assert difference(loaded, expected) is None


@writable_buffer
def test_without_a_copy_memory_is_shared(make: Callable, blob: bytes, expected: dict, tmp_path: Path) -> None:
    buffer = make(blob, tmp_path)
    loaded = load(buffer, copy=False)
    assert difference(loaded, expected) is None
    loaded["ones"].fill_(2)
    loaded["steps"].add_(40)
    twice = load(contents(buffer))
    assert twice["ones"].tolist() == [2, 2, 2, 2]
    assert twice["steps"].tolist() == [40, 41, 42]
    fill(buffer, blob)
    assert difference(loaded, expected) is None


def test_without_a_copy_a_shared_map_writes_through(blob: bytes, tmp_path: Path) -> None:
    buffer = mapped(blob, tmp_path, mmap.ACCESS_WRITE)
    load(buffer, copy=False)["ones"].fill_(5)
    buffer.flush()
    assert load_file(tmp_path / "mapped")["ones"].tolist() == [5, 5, 5, 5]


@read_only_buffer
def test_without_a_copy_a_read_only_buffer_is_refused(make: Callable, blob: bytes, tmp_path: Path) -> None:
    with pytest.raises((BufferError, TypeError, ValueError), match="(?i)read-?\\s?only|writ(e|able)"):
        load(make(blob, tmp_path), copy=False)


def test_shared_memory_lives_as_long_as_its_tensors(blob: bytes, expected: dict) -> None:
    loaded = load(bytearray(blob), copy=False)
    gc.collect()
    noise = [bytearray(len(blob)) for _ in range(100)]
    assert difference(loaded, expected) is None
    assert not any(any(item) for item in noise)


def test_shared_memory_cannot_move_while_a_tensor_uses_it(blob: bytes, expected: dict) -> None:
    buffer = bytearray(blob)
    loaded = load(buffer, copy=False)
    with pytest.raises(BufferError):
        buffer.extend(bytes(1 << 20))
    assert difference(loaded, expected) is None
    loaded.clear()
    gc.collect()
    buffer.extend(b"free again")


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("shift", range(1, 8))
def test_unaligned_tensors(copy: bool, shift: int) -> None:
    header = {"pad": entry("U8", [shift], 0, shift), "value": entry("F64", [2], shift, shift + 16)}
    value = torch.tensor([0.5, -2.0], dtype=torch.float64)
    data = bytearray(pack(header, bytes(shift) + bytes(value.view(torch.uint8).tolist())))
    loaded = load(data, copy=copy)
    assert loaded["value"].tolist() == [0.5, -2.0]
    assert loaded["value"].data_ptr() % 8 == 0


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(code: str, copy: bool) -> None:
    tensors = {"matrix": sample(DTYPES[code]), "none": sample(DTYPES[code], (2, 0, 4))}
    if code != "F4":
        tensors["scalar"] = sample(DTYPES[code], ())
    assert difference(load(bytearray(encode(tensors)), copy=copy), tensors) is None


def test_order_is_the_files() -> None:
    header = {
        "late": entry("U8", [2], 4, 6),
        "none_z": entry("U8", [0], 4, 4),
        "early": entry("F32", [1], 0, 4),
        "none_a": entry("U8", [0], 4, 4),
    }
    loaded = load(pack(header, bytes(6)))
    assert list(loaded) == ["early", "none_a", "none_z", "late"]


def test_parameters_come_back_as_plain_tensors() -> None:
    loaded = load(save({"parameter": torch.nn.Parameter(torch.ones(2))}))
    assert type(loaded["parameter"]) is torch.Tensor
    assert not loaded["parameter"].requires_grad


def test_matches_the_reference(path: Path, reference) -> None:
    blob = path.read_bytes()
    assert difference(load(blob), reference.load(blob)) is None
