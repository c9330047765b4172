"""get_slice(name)[index] against tensor[index]: thousands of random indices, and the bytes that some of them read.

The cases are the same in every run; a failure names the seed of its case.
"""

from __future__ import annotations

import random
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from random_state import flat_bytes
from safetensors_torch import safe_open
from support import DTYPES, bytes_read, encode, entry, pack

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using a non-tuple sequence", "ignore:indexing with dtype torch.uint8", "ignore:Truncating the start"
)

CODES = ["F32", "BF16", "C64", "F8_E4M3", "I64", "U16", "BOOL", "F4"]
SHAPES = [(), (0,), (7,), (1, 1, 8), (5, 6), (3, 0, 4), (23, 40), (2, 3, 4, 5), (3, 1, 2, 2, 3)]
# For each dtype, backend and kind of index.
CASES = 400


class One:
    """An integer by its __index__ only."""

    def __index__(self) -> int:
        return 1


def bound(rng: random.Random, size: int) -> Any:
    value = rng.randint(-size - 3, size + 3)
    kind = rng.random()
    if kind < 0.3:
        return None
    if kind < 0.35:
        return rng.choice([-(2**70), -(2**40), 2**40, 2**70])
    if kind < 0.4:
        return rng.choice([np.int64, np.int8])(value)
    return value


def random_slice(rng: random.Random, size: int) -> slice:
    step = rng.choice([None, None, 1, 1, 2, 3, size + 1, size + 2, np.int32(2), 2**40, 0, -1])
    if rng.random() < 0.7:  # mostly one that torch accepts
        step = rng.choice([None, 1, 1, 2, 3, 5])
    return slice(bound(rng, size), bound(rng, size), step)


def random_int(rng: random.Random, size: int) -> Any:
    value = rng.randint(-size, max(size - 1, 0))
    if rng.random() < 0.1:
        value = rng.choice([size, -size - 1, 2**31, -(2**63), 2**70])
    elif rng.random() < 0.2:
        value = rng.choice([np.int64, np.int16, torch.tensor])(value)
    return value


def basic_item(rng: random.Random, size: int) -> Any:
    return random_slice(rng, size) if rng.random() < 0.6 else random_int(rng, size)


def any_item(rng: random.Random, size: int) -> Any:
    """Returns a random item for a dimension of this size, which torch may refuse."""
    kind = rng.choice("basic basic basic none bool list mask tensor byte array odd".split())
    numbers = [rng.randint(-size, max(size - 1, 0)) for _ in range(rng.choice([0, 1, 2, 2, 5]))]
    if rng.random() < 0.1:
        numbers.append(size)
    mask = [rng.random() < 0.5 for _ in range(size)]
    made = {
        "basic": lambda: basic_item(rng, size),
        "none": lambda: None,
        "bool": lambda: rng.random() < 0.5,
        "list": lambda: numbers,
        "mask": lambda: rng.choice([list, torch.tensor, np.array])(mask),
        "tensor": lambda: torch.tensor(numbers, dtype=rng.choice([torch.int64, torch.int32])),
        "byte": lambda: torch.tensor(mask, dtype=torch.uint8),
        "array": lambda: np.array(numbers, dtype=np.int64),
        "odd": lambda: rng.choice(
            [1.5, "x", range(min(size, 2)), One(), [numbers, numbers], torch.ones(2, 2, dtype=torch.bool), (0,)]
            + [torch.tensor(True), torch.tensor(0, dtype=torch.uint8), torch.tensor(0.5), np.bool_(True), object()]
            + [
                slice(One(), None),
                slice(torch.tensor(-2), torch.tensor(9), torch.tensor(2)),
                slice(0.5),
                slice(None, "a"),
                [0.5],
                [[]],
                torch.tensor([1j]),
                np.array(0),
            ]
        ),
    }
    return made[kind]()


def random_index(rng: random.Random, shape: tuple[int, ...], item: Callable[[random.Random, int], Any]) -> Any:
    """Returns items for most dimensions, sometimes for one too many, perhaps with an ellipsis."""
    count = rng.choice([len(shape), rng.randint(0, len(shape)), rng.randint(0, len(shape) + 1)])
    items = [item(rng, shape[i] if i < len(shape) else 3) for i in range(count)]
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2])):
        at = rng.randint(0, len(items))
        if rng.random() < 0.7 and count <= len(shape):
            # Items behind it are for the last dimensions.
            items[at:] = [item(rng, shape[i]) for i in range(len(shape) - count + at, len(shape))]
        items.insert(at, ...)
    if len(items) == 1 and rng.random() < 0.5:
        return items[0]
    return tuple(items) if rng.random() < 0.98 else items


def outcome(tensor: Any, index: Any) -> Any:
    """Returns the dtype, shape and bytes, or the type of the exception."""
    try:
        part = tensor[index]
        assert part.device.type == "cpu" and not part.requires_grad
        # A dimension of 1 may have any stride, which prevents a view of its bytes.
        return part.dtype, part.shape, flat_bytes(part.clone(memory_format=torch.contiguous_format)).tolist()
    except Exception as error:
        return type(error)


def tensors_of(code: str) -> dict[str, torch.Tensor]:
    rng = random.Random(code)
    made = {}
    for shape in SHAPES:
        # No F4 scalar: two values share a byte.
        if code != "F4" or shape:
            count = torch.Size(shape).numel() * DTYPES[code].itemsize
            raw = torch.tensor([rng.randrange(2 if code == "BOOL" else 256) for _ in range(count)], dtype=torch.uint8)
            made[str(shape)] = raw.view(DTYPES[code]).reshape(shape)
    return made


@pytest.fixture(scope="module", params=[code for code in CODES if code in DTYPES])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    tensors = tensors_of(request.param)
    path = tmp_path_factory.mktemp("slices") / request.param
    path.write_bytes(encode(tensors))
    return path, tensors


@pytest.mark.parametrize("kind", ["basic", "any"])
def test_random_slices_equal_those_of_torch(kind: str, given: tuple[Path, dict], backend: str) -> None:
    path, tensors = given
    refused = empty = 0
    with safe_open(path, backend=backend) as file:
        for case in range(CASES):
            seed = f"{path.name} {kind} {case}"
            rng = random.Random(seed)
            name, tensor = rng.choice(list(tensors.items()))
            index = random_index(rng, tuple(tensor.shape), basic_item if kind == "basic" else any_item)
            expected = outcome(tensor, index)
            found = outcome(file.get_slice(name), index)
            assert found == expected, f"seed {seed!r}: shape {list(tensor.shape)}, index {index!r}"
            refused += isinstance(expected, type)
            empty += not isinstance(expected, type) and 0 in expected[1]
    # Some of the compared results are errors or empty, but not all.
    assert CASES / 100 < refused < CASES * 0.75 and CASES / 100 < empty < CASES * 0.7, (refused, empty)


@pytest.mark.parametrize("step", [2**31, 2**62, 2**63 - 1, 2**70, -(2**70)])
def test_steps_beyond_all_sizes(step: int, given: tuple[Path, dict], backend: str) -> None:
    path, tensors = given
    with safe_open(path, backend=backend) as file:
        for name, tensor in tensors.items():
            for start in (None, 1):
                index = (slice(start, None, step), ...)
                assert outcome(file.get_slice(name), index) == outcome(tensor, index), (name, index)


def test_a_slice_on_the_meta_device_has_the_shape(given: tuple[Path, dict], backend: str) -> None:
    path, tensors = given
    with safe_open(path, device="meta", backend=backend) as file:
        for name, tensor in tensors.items():
            for index in (..., None, (None, ...), True, slice(1, 3), (..., slice(0, 5, 2)), (slice(9, None), ...)):
                try:
                    expected = tensor.to("meta")[index]
                except IndexError:
                    with pytest.raises(IndexError):
                        file.get_slice(name)[index]
                    continue
                part = file.get_slice(name)[index]
                assert (part.device.type, part.dtype, part.shape) == ("meta", expected.dtype, expected.shape)


KIB, MIB = 1 << 10, 1 << 20
# For a matrix of 64 MiB of F32 with this many columns: the bytes that an index selects, and the most that may be read.
# Gaps of less than a page are read.
READS = {
    "row": (4096, 7, 16 * KIB, 16 * KIB),
    "row by a tensor": (4096, torch.tensor(-7), 16 * KIB, 16 * KIB),
    "rows": (4096, slice(100, 164), MIB, MIB),
    "rows, with a new dimension": (4096, (None, slice(100, 164), None), MIB, MIB),
    "rows, with bools": (4096, (True, slice(100, 164)), MIB, MIB),
    "no rows, for a bool": (4096, (False, slice(100, 164)), 0, MIB),
    "every 100th row": (4096, slice(None, None, 100), 41 * 16 * KIB, 41 * 16 * KIB),
    "column": (4096, (..., 3), 16 * KIB, 16 * KIB),
    "columns": (4096, (slice(None), slice(8, 24)), 256 * KIB, 256 * KIB),
    "part of some rows": (4096, (slice(3, 1000, 100), slice(10, 20)), 400, 400),
    "steps in a row": (4096, (5, slice(None, None, 3)), 1366 * 4, 16 * KIB),
    "steps beyond a page": (1 << 20, (5, slice(None, None, 2048)), 2 * KIB, 2 * KIB),
    "column of short rows": (256, (slice(1000, 2000), 9), 4000, 1000 * KIB),
    "block of short rows": (256, (slice(1000, 2000), slice(0, 128)), 500 * KIB, 1000 * KIB),
    "one element": (4096, (-1, -1), 4, 4),
    "nothing": (4096, slice(9, 3), 0, 0),
    "nothing of rows": (4096, (slice(None), slice(9, 9)), 0, 0),
    "list beside a slice": (4096, (slice(64, 128), [3, 5]), 512, MIB),
    "tensor beside an int": (4096, (9, torch.tensor([3, 5])), 8, 16 * KIB),
    "mask beside an int": (4096, (9, torch.arange(4096) % 2 == 0), 8 * KIB, 16 * KIB),
    "rows by a list": (4096, ([1, 2], slice(16, 32)), 128, 256 * KIB),
}
# The reads of /proc/self/io itself.
NOISE = 512


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    directory = tmp_path_factory.mktemp("sparse")

    def make(columns: int) -> Path:
        path = directory / str(columns)
        if not path.exists():
            path.write_bytes(pack({"a": entry("F32", [64 * MIB // 4 // columns, columns], 0, 64 * MIB)}))
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size + 64 * MIB)
        return path

    return make


@pytest.mark.alone
@pytest.mark.parametrize("columns, index, selected, most", READS.values(), ids=READS)
def test_pread_reads_only_what_is_needed(
    columns: int, index: Any, selected: int, most: int, sparse: Callable[[int], Path]
) -> None:
    with safe_open(sparse(columns), backend="pread") as file:
        part = file.get_slice("a")
        before = bytes_read()
        result = part[index]
        read = bytes_read() - before
    assert result.nbytes == selected and not result.any()
    assert selected <= read <= most + NOISE


@pytest.mark.alone
def test_refused_indices_read_nothing(sparse: Callable[[int], Path]) -> None:
    with safe_open(sparse(4096), backend="pread") as file:
        part = file.get_slice("a")
        before = bytes_read()
        for index in (4096, (0, 0, 0), (..., 4096), slice(None, None, 0), ([0], -4097), 0.5, [[4096]]):
            with pytest.raises((IndexError, ValueError)):
                part[index]
        assert bytes_read() - before <= NOISE


@pytest.mark.alone
def test_whole_arrays_read_the_whole_tensor(sparse: Callable[[int], Path]) -> None:
    """The count of bytes detects a read of a whole tensor."""
    with safe_open(sparse(4096), backend="pread") as file:
        before = bytes_read()
        assert file.get_slice("a")[np.array([3])].shape == (1, 4096)
        assert bytes_read() - before >= 64 * MIB


def test_a_part_has_memory_of_its_own_size(sparse: Callable[[int], Path]) -> None:
    with safe_open(sparse(4096), backend="pread") as file:
        part = file.get_slice("a")[5, ::2]
    assert part.untyped_storage().nbytes() == part.nbytes == 8 * KIB


def test_shape_and_dtype_take_no_longer_than_the_reference(reference: Any, path: Path) -> None:
    """Takes the best of many alternating rounds, so that other programs slow both alike."""
    with safe_open(path) as ours, reference.safe_open(path, "pt") as theirs:
        slices = ours.get_slice("weight"), theirs.get_slice("weight")
        for name in ("get_shape", "get_dtype"):
            methods = [getattr(part, name) for part in slices]
            rounds = [[timeit.timeit(method, number=2000) for method in methods] for _ in range(25)]
            mine, reference_s = (min(times) for times in zip(*rounds, strict=True))
            assert mine < 1.5 * reference_s, f"{name}: {mine / reference_s:.2f}"
