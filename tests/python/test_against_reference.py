"""The same bytes and the same tensors as the reference implementation, over a thousand random state dicts.

If the reference fails on a valid file (F4 and F8_E8M0 in its `load`, F4 in its pread backend), the saved tensors are
expected. Other files test the deliberate differences.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch as reference
import torch

import safetensors_torch
from random_state import DTYPES, ODD_NAMES, State, difference, offset_order, random_state

BATCHES = 20
STATES_PER_BATCH = 50
BACKENDS = ("mmap", "pread")


def say(state: State, what: str) -> str:
    return f"random_state({state.seed}): {what}"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_same_bytes_and_tensors(batch: int, tmp_path: Path) -> None:
    for seed in range(batch * STATES_PER_BATCH, (batch + 1) * STATES_PER_BATCH):
        check(random_state(seed), tmp_path)


def check(state: State, directory: Path) -> None:
    expected = reference.save(state.tensors, state.metadata)
    assert safetensors_torch.save(state.tensors, state.metadata) == expected, say(state, "save gives other bytes")

    theirs, ours = directory / "theirs.safetensors", directory / "ours.safetensors"
    reference.save_file(state.tensors, theirs, state.metadata)
    safetensors_torch.save_file(state.tensors, ours, state.metadata)
    assert theirs.read_bytes() == expected, say(state, "the reference disagrees with itself")
    assert ours.read_bytes() == expected, say(state, "save_file gives other bytes")

    order = offset_order(expected)
    for way, loaded in our_reads(expected, theirs):
        assert difference(loaded, state.tensors) is None, say(state, f"{way}: {difference(loaded, state.tensors)}")
        assert list(loaded) == order, say(state, f"{way}: order {list(loaded)!a}, expected {order!a}")
    for way, loaded in reference_reads(state, ours):
        assert difference(loaded, state.tensors) is None, say(state, f"reference {way} reads ours otherwise")
    for library, path in ((reference.safe_open, ours), (safetensors_torch.safe_open, theirs)):
        with library(path, framework="pt") as file:
            assert file.metadata() == state.metadata, say(state, f"{library.__module__} gives other metadata")


def our_reads(data: bytes, path: Path):
    yield "load", safetensors_torch.load(data)
    yield "load without a copy", safetensors_torch.load(bytearray(data), copy=False)
    for backend in BACKENDS:
        yield backend, safetensors_torch.load_file(path, backend=backend)


def reference_reads(state: State, path: Path):
    held = {tensor.dtype for tensor in state.tensors.values()}
    if not held & {torch.float4_e2m1fn_x2, torch.float8_e8m0fnu}:
        yield "load", reference.load(path.read_bytes())
    if torch.float4_e2m1fn_x2 not in held:
        yield "pread", reference.load_file(path, backend="pread")
    yield "mmap", reference.load_file(path, backend="mmap")


def test_the_seeds_cover_what_a_file_can_hold() -> None:
    states = [random_state(seed) for seed in range(BATCHES * STATES_PER_BATCH)]
    tensors = [tensor for state in states for tensor in state.tensors.values()]
    names = {name for state in states for name in state.tensors}
    assert {tensor.dtype for tensor in tensors} == set(DTYPES)
    assert names >= set(ODD_NAMES)
    assert {tensor.dtype for tensor in tensors if tensor.dim() == 0} == set(DTYPES) - {torch.float4_e2m1fn_x2}
    assert {tensor.dtype for tensor in tensors if tensor.numel() == 0} == set(DTYPES)
    assert {tensor.dtype for tensor in tensors if isinstance(tensor, torch.nn.Parameter)} == set(DTYPES)
    assert any(tensor.dtype == torch.float32 and tensor.isnan().any() for tensor in tensors)
    assert {len(state.metadata) if state.metadata is not None else None for state in states} == {None, 0, 1}


def test_a_seed_gives_one_state() -> None:
    for seed in range(20):
        first, second = random_state(seed), random_state(seed)
        assert list(first.tensors) == list(second.tensors)
        assert reference.save(first.tensors, first.metadata) == reference.save(second.tensors, second.metadata)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes_is_laid_out_alike(dtype: torch.dtype) -> None:
    for other in DTYPES:
        tensors = {
            "b": torch.ones(4, dtype=torch.uint8).view(other) if other.itemsize <= 4 else torch.ones(4).to(other)
        }
        tensors["a"] = torch.ones(8, dtype=torch.uint8).view(dtype)
        assert safetensors_torch.save(tensors) == reference.save(tensors), f"{dtype} beside {other}"


@pytest.mark.parametrize("length", range(8))
def test_headers_of_every_length_are_padded_alike(length: int) -> None:
    tensors = {"n" * length: torch.arange(3)}
    assert safetensors_torch.save(tensors) == reference.save(tensors)


def test_a_scalar_of_packed_values_is_refused_by_both(tmp_path: Path) -> None:
    tensors = {"half_a_byte": torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    path = tmp_path / "never.safetensors"
    with pytest.raises(safetensors.SafetensorError):
        reference.save(tensors)
    with pytest.raises(safetensors_torch.SafetensorError, match="half_a_byte"):
        safetensors_torch.save(tensors)
    with pytest.raises(safetensors_torch.SafetensorError, match="half_a_byte"):
        safetensors_torch.save_file(tensors, path)
    assert not path.exists()
