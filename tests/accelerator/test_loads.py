"""Loads to a device in every mode: the right values, and no memory besides that of the tensors."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

import accelerator
import safetensors_torch
from accelerator import device
from safetensors_torch import SafetensorError, load, load_file, safe_open
from support import DTYPES, encode, sample
from support_accelerator import MIB, SLAB, assert_equal, reserve, values, write


def allocated(index: int = 0) -> int:
    gc.collect()
    return accelerator.statistics()["devices"][index]["allocated"]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_load_file(path: Path, tensors: dict, mode: str, backend: str, index: int, overlaps: bool) -> None:
    for _ in range(3):
        accelerator.reset_statistics()
        assert_equal(load_file(path, device(index), backend=backend), tensors, index)
        seen = accelerator.statistics()
        assert seen["to_device_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        assert seen["device_waits"] == seen["stream_waits"] == 0


def test_the_copies_of_a_load_do_not_block(path: Path, mode: str, overlaps: bool) -> None:
    before = accelerator.statistics()["blocking_copies"]
    load_file(path, device())
    blocked = accelerator.statistics()["blocking_copies"] - before
    assert (blocked == 0) == overlaps


def test_load_of_bytes(path: Path, tensors: dict, mode: str) -> None:
    data = bytearray(path.read_bytes())
    loaded = load(data, device())
    data[:] = bytes(len(data))  # the tensors are independent of their source
    assert_equal(loaded, tensors)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_open_files(path: Path, tensors: dict, mode: str, backend: str) -> None:
    with safe_open(path, device=device(), backend=backend) as file:
        assert_equal(file.get_tensors(), tensors)
        for name in ("large.3", "small.007", "empty", "step", "half"):
            assert_equal({name: file.get_tensor(name)}, {name: tensors[name]})


def test_writes_to_a_mapping_reach_the_device(path: Path, tensors: dict, mode: str) -> None:
    with safe_open(path) as host, safe_open(path, device=device()) as _:
        host.get_tensor("large.0").fill_(7)
    file = torch.classes.safetensors_torch.File(str(path), "mmap")
    file.get_tensor("large.0", torch.device("cpu")).fill_(7)
    assert_equal({"x": file.get_tensor("large.0", device())}, {"x": torch.full_like(tensors["large.0"], 7)})


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize(
    "index",
    [
        (slice(100, 2900),),
        (slice(None), slice(1, 700, 3)),
        (slice(5, 3000, 7), slice(3, 4)),
        (17,),
        (..., -1),
        (None, 17, ..., None, slice(600, None)),
        (True, 5, [3, 9]),
        (slice(9, 9),),
    ],
    ids=repr,
)
def test_slices(tmp_path: Path, mode: str, backend: str, index: tuple) -> None:
    whole = values(3000 * 701).reshape(3000, 701)
    path = write(tmp_path / "a", {"x": whole})
    with safe_open(path, device=device(), backend=backend) as file:
        assert_equal({"x": file.get_slice("x")[index]}, {"x": whole[index].contiguous()})


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(tmp_path: Path, code: str) -> None:
    reserve(4)
    state = {f"{i}": sample(DTYPES[code], shape) for i, shape in enumerate([(2, 4), (0, 2), (1001, 2), (1, 2)])}
    path = tmp_path / "a"
    path.write_bytes(encode(state))
    for name, tensor in load_file(path, device()).items():
        assert tensor.dtype == state[name].dtype and tensor.shape == state[name].shape
        assert torch.equal(tensor.cpu().view(torch.uint8), state[name].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_conversion(path: Path, tensors: dict, mode: str, dtype: torch.dtype) -> None:
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    assert_equal(load_file(path, device(), dtype=dtype), expected)
    assert_equal(load(path.read_bytes(), device(), dtype=dtype), expected)
    assert_equal(torch.ops.safetensors_torch.load_file(str(path), device=device(), dtype=dtype), expected)


def test_names(path: Path, tensors: dict, mode: str) -> None:
    wanted = ["step", "large.3", "small.050"]
    accelerator.reset_statistics()
    loaded = load_file(path, device(), names=wanted)
    assert accelerator.statistics()["to_device_bytes"] == sum(tensors[name].nbytes for name in wanted)
    assert_equal(loaded, {name: tensors[name] for name in wanted})
    small = {name: tensor for name, tensor in tensors.items() if name.startswith("small")}
    assert_equal(load_file(path, device(), names=lambda name: name.startswith("small")), small)
    assert load_file(path, device(), names=[]) == {}
    with pytest.raises(SafetensorError, match="File does not contain tensor absent"):
        load_file(path, device(), names=["absent"])


def test_each_tensor_has_its_own_storage(path: Path, mode: str) -> None:
    loaded = load_file(path, device())
    for tensor in loaded.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
        assert not tensor.requires_grad
    pointers = [tensor.data_ptr() for tensor in loaded.values() if tensor.nbytes]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_device_memory_is_that_of_the_tensors_and_one_slab(path: Path, dtype: torch.dtype | None) -> None:
    reserve(8)
    before = allocated()
    accelerator.reset_statistics()
    loaded = load_file(path, device(), dtype=dtype)
    own = sum((tensor.nbytes + 511) // 512 * 512 for tensor in loaded.values())
    peak = accelerator.statistics()["devices"][0]["peak"] - before
    assert own <= peak <= own + (SLAB if dtype is not None else 0)
    assert allocated() - before == own
    del loaded
    assert allocated() == before


def test_a_load_to_the_meta_device_copies_nothing(path: Path, tensors: dict) -> None:
    loaded = load_file(path, "meta", dtype=torch.float16)
    assert all(tensor.is_meta for tensor in loaded.values())
    assert loaded["large.0"].dtype == torch.float16 and loaded["step"].dtype == torch.int64
    assert accelerator.statistics()["to_device_copies"] == 0


def test_a_device_without_an_index_is_the_current_one(path: Path, tensors: dict) -> None:
    reserve(4)
    before = torch.accelerator.current_device_index()
    try:
        torch.accelerator.set_device_index(1)
        assert_equal(load_file(path, accelerator.NAME), tensors, 1)
        assert torch.accelerator.current_device_index() == 1
        assert_equal(load_file(path, device(0)), tensors, 0)
        assert torch.accelerator.current_device_index() == 1, "a load leaves the current device alone"
    finally:
        torch.accelerator.set_device_index(before)


def test_no_other_thread_touches_the_device(path: Path, tensors: dict) -> None:
    reserve(8)
    safetensors_torch.set_transfer_options(threads=4)
    accelerator.reset_statistics()
    assert_equal(load_file(path, device(1)), tensors, 1)
    assert accelerator.statistics()["threads"] == 1


def test_progress(path: Path, tensors: dict, mode: str) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    told: list[tuple[int, int]] = []
    load_file(path, device(), progress=lambda done, all_: told.append((done, all_)))
    assert told[-1] == (total, total)
    load(path.read_bytes(), device(), progress=lambda done, all_: told.append((done, all_)))
    assert told[-1] == (total, total)
    assert all(all_ == total and 0 <= done <= total for done, all_ in told)


def test_a_large_file_pins_memory_as_it_needs_it(tmp_path: Path) -> None:
    state = {f"{i}": torch.full((8 * MIB,), i, dtype=torch.int32) for i in range(5)}
    path = write(tmp_path / "a", state)
    total = sum(tensor.nbytes for tensor in state.values())
    accelerator.set_delay(0)
    assert safetensors_torch.transfer_memory() == 0
    assert_equal(load_file(path, device()), state)
    first = safetensors_torch.transfer_memory()
    assert 4 * SLAB <= first <= total // 16
    assert accelerator.statistics()["pinned_peak"] == first
    assert_equal(load_file(path, device()), state)
    assert safetensors_torch.transfer_memory() >= first


def test_only_many_small_files_pin_memory(path: Path, tensors: dict) -> None:
    accelerator.set_delay(0)
    assert_equal(load_file(path, device()), tensors)
    assert safetensors_torch.transfer_memory() == accelerator.statistics()["pinned_peak"] == 0
    loads = 1
    while safetensors_torch.transfer_memory() == 0:
        load_file(path, device())
        loads += 1
        assert loads < 40
    moved = loads * sum(tensor.nbytes for tensor in tensors.values())
    assert safetensors_torch.transfer_memory() == 4 * SLAB <= moved // 64
