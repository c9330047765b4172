"""Saves of tensors on a device in every mode: the bytes in the file, and the memory of the host."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import accelerator
import safetensors_torch
from accelerator import device, hold, release
from proc import eventually
from safetensors_torch import IncrementalWriter, SafetensorError, save, save_file
from support import DTYPES, encode, sample
from support_accelerator import MIB, SLAB, reserve, values


def test_the_bytes_are_those_of_the_same_tensors_on_the_host(tmp_path: Path, tensors: dict, mode: str) -> None:
    expected = save(tensors, {"format": "pt"})
    for index in (0, 1):
        moved = {name: tensor.to(device(index)) for name, tensor in tensors.items()}
        accelerator.reset_statistics()
        save_file(moved, tmp_path / "a", {"format": "pt"})
        assert (tmp_path / "a").read_bytes() == expected
        seen = accelerator.statistics()
        assert seen["to_host_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        assert seen["device_waits"] == seen["stream_waits"] == 0
        assert save(moved, {"format": "pt"}) == expected
        assert bytes(torch.ops.safetensors_torch.save(moved, {"format": "pt"}).numpy()) == expected


def test_tensors_of_all_devices_in_one_file(tmp_path: Path, tensors: dict, mode: str) -> None:
    places = ["cpu", device(0), device(1)]
    moved = {name: tensor.to(places[i % 3]) for i, (name, tensor) in enumerate(tensors.items())}
    save_file(moved, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == save(tensors)


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(code: str) -> None:
    reserve(3)
    state = {f"{i}": sample(DTYPES[code], shape) for i, shape in enumerate([(2, 4), (0, 2), (1001, 2)])}
    assert save({name: tensor.to(device()) for name, tensor in state.items()}) == encode(state)


def test_tensor_by_tensor(tmp_path: Path, tensors: dict, mode: str) -> None:
    places = [device(0), "cpu", device(1)]
    accelerator.reset_statistics()
    with IncrementalWriter(tmp_path / "a", tensors, {"format": "pt"}) as writer:
        for i, name in enumerate(reversed(list(tensors))):
            writer.write(name, tensors[name].to(places[i % 3]))
    assert (tmp_path / "a").read_bytes() == save(tensors, {"format": "pt"})
    seen = accelerator.statistics()
    assert seen["device_waits"] == seen["stream_waits"] == 0


def test_writing_one_tensor_takes_no_more_than_the_pinned_pool(tmp_path: Path) -> None:
    reserve(2)
    accelerator.set_delay(0)
    state = {f"{i}": values(3 * MIB, i).to(device()) for i in range(4)}
    accelerator.reset_statistics()
    with IncrementalWriter(tmp_path / "a", state) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    assert safetensors_torch.transfer_memory() == accelerator.statistics()["pinned_peak"] == 2 * SLAB
    assert (tmp_path / "a").read_bytes() == save(state)


def test_views_into_a_larger_memory(mode: str) -> None:
    whole = values(3 * MIB)
    on_device = whole.to(device())
    parts = {"a": slice(5, MIB), "b": slice(MIB, MIB + 1), "c": slice(2 * MIB + 3, 3 * MIB)}
    found = save({name: on_device[part] for name, part in parts.items()})
    assert found == save({name: whole[part] for name, part in parts.items()})


@pytest.mark.parametrize("view", [torch.conj, torch._neg_view], ids=["conjugate", "negative"])
def test_lazy_views_are_saved_with_their_values(mode: str, view: object) -> None:
    host = torch.complex(values(1000), values(1000, 1))
    expected = {"a": host, "b": view(host).resolve_conj().resolve_neg(), "c": host + 1}
    on_device = host.to(device())
    moved = {"a": on_device, "b": view(host.clone().to(device())), "c": (host + 1).to(device())}
    assert save(moved) == save(expected)


def test_a_tensor_that_is_not_contiguous_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="non contiguous tensor: `x`"):
        save_file({"x": torch.zeros(4, 5, device=device()).t()}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_shared_memory_on_a_device_is_refused(tmp_path: Path) -> None:
    x = torch.zeros(10, device=device())
    with pytest.raises(RuntimeError, match=r"share memory.*\{'a', 'b'\}"):
        save_file({"a": x, "b": x[2:]}, tmp_path / "a")


def test_the_host_uses_no_more_than_the_pinned_pool(tmp_path: Path) -> None:
    reserve(4)
    state = {f"{i}": values(MIB, i).to(device()) for i in range(16)}
    accelerator.set_delay(0)
    accelerator.reset_statistics()
    save_file(state, tmp_path / "a")
    assert safetensors_torch.transfer_memory() == accelerator.statistics()["pinned_peak"] == 4 * SLAB


def test_only_slabs_that_arrived_are_written(tmp_path: Path) -> None:
    """Half of the slabs are copied, then the device stops: the other half must not be written."""
    reserve(8)
    state = {f"{i}": values(MIB // 2, i) for i in range(8)}
    moved = {name: tensor.to(device()) for name, tensor in state.items()}
    told: list[int] = []
    accelerator.synchronize()
    hold(0)
    thread = threading.Thread(
        target=save_file, args=(moved, tmp_path / "a"), kwargs={"progress": lambda done, total: told.append(done)}
    )
    thread.start()
    header = len(save(state)) - sum(tensor.nbytes for tensor in state.values())
    assert eventually(lambda: len(told) > 2)
    assert set(told) <= {0, header}
    release(0)
    thread.join()
    assert (tmp_path / "a").read_bytes() == save(state) and told[-1] == len(save(state))


def test_progress(tmp_path: Path, tensors: dict, mode: str) -> None:
    moved = {name: tensor.to(device()) for name, tensor in tensors.items()}
    told: list[tuple[int, int]] = []
    save_file(moved, tmp_path / "a", progress=lambda done, total: told.append((done, total)))
    size = (tmp_path / "a").stat().st_size
    assert told[-1] == (size, size) and all(total == size and 0 <= done <= size for done, total in told)


def test_a_dtype_without_a_code(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="'x' has dtype complex128"):
        save_file({"x": torch.zeros(3, dtype=torch.complex128, device=device())}, tmp_path / "a")
