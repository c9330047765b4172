"""The memory that loads and saves need, and the owner of the tensors' memory."""

from __future__ import annotations

import gc
import struct
from pathlib import Path

import pytest
import torch

import safetensors_torch
from proc import growth, peak_growth, peak_resident_growth
from safetensors_torch import SafetensorError, load, load_file, safe_open, save, save_file

MIB = 2**20
TOTAL = 160 * MIB
# Room for Python and torch, besides the tensors.
SLACK = 8 * MIB

TENSORS = f"""
    tensors = {{f"t{{i}}": torch.full(({TOTAL // 16 // 4},), float(i)) for i in range(16)}}
"""
MODEL = f"""
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(16):
                self.register_parameter(f"t{{i}}", torch.nn.Parameter(torch.ones({TOTAL // 16 // 4})))
    model = Model()
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "model.safetensors"
    save_file({f"t{i}": torch.full((TOTAL // 16 // 4,), float(i)) for i in range(16)}, path)
    return path


def test_save_allocates_only_the_bytes() -> None:
    growth = peak_growth(TENSORS, "data = safetensors_torch.save(tensors)")
    assert TOTAL <= growth < 1.1 * TOTAL


def test_save_file_allocates_nothing(tmp_path: Path) -> None:
    growth = peak_growth(TENSORS, f"safetensors_torch.save_file(tensors, {str(tmp_path / 'out')!r})")
    assert growth < SLACK


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_load_model_allocates_nothing(backend: str, file: Path) -> None:
    growth = peak_growth(MODEL, f"safetensors_torch.load_model(model, {str(file)!r}, backend={backend!r})")
    assert growth < SLACK


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_load_model_keeps_little_of_the_file_resident(backend: str, file: Path) -> None:
    setup = f"{MODEL}    safetensors_torch.set_transfer_options(threads=2)"
    growth = peak_resident_growth(setup, f"safetensors_torch.load_model(model, {str(file)!r}, backend={backend!r})")
    # Each thread has a chunk of the mapping at a time.
    assert growth < TOTAL // 4 + SLACK


# A column block with rows of more than a page, and of less; a transposed destination.
@pytest.mark.parametrize("view", ["[:, :2048]", "[:, 64:1024]", ".t()"])
def test_load_into_a_strided_tensor_allocates_little(view: str, tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    setup = f"""
        from safetensors_torch.distributed import load_into
        target = torch.ones(4096, 5000){view}
        value = torch.arange(target.numel(), dtype=torch.float32).view(target.shape)
        safetensors_torch.save_file({{"weight": value}}, {path!r})
    """
    work = f"load_into({{'weight': target}}, {path!r})\nassert torch.equal(target, value)"
    assert peak_growth(setup, work) < SLACK


def test_load_file_pread_allocates_only_the_tensors(file: Path) -> None:
    growth = peak_growth("", f"tensors = safetensors_torch.load_file({str(file)!r}, backend='pread')")
    assert TOTAL <= growth < 1.1 * TOTAL


def test_load_allocates_only_the_tensors(file: Path) -> None:
    setup = f"data = pathlib.Path({str(file)!r}).read_bytes()"
    growth = peak_growth(setup, "tensors = safetensors_torch.load(data)")
    assert TOTAL <= growth < 1.1 * TOTAL


def test_load_without_a_copy_allocates_nothing(file: Path) -> None:
    setup = f"data = bytearray(pathlib.Path({str(file)!r}).read_bytes())"
    assert peak_growth(setup, "tensors = safetensors_torch.load(data, copy=False)") < SLACK


@pytest.mark.parametrize("call", ["load_file({path!r}, backend='pread')", "load(data)"])
@pytest.mark.parametrize("kept", ["small", "large"])
def test_a_kept_tensor_keeps_little_other_memory(call: str, kept: str, tmp_path: Path) -> None:
    sizes = {"small": 46 << 10, "large": 300 << 10}
    tensors = {}
    for i in range(60):
        tensors[f"{i}.small"] = torch.full((sizes["small"],), i, dtype=torch.uint8)
        tensors[f"{i}.large"] = torch.full((sizes["large"],), i, dtype=torch.uint8)
        tensors[f"{i}.larger"] = torch.full((3 * MIB,), i, dtype=torch.uint8)
    save_file(tensors, tmp_path / "many")
    path = str(tmp_path / "many")
    setup = f"""
        data = pathlib.Path({path!r}).read_bytes()
        safetensors_torch.load(data)  # the first load allocates some memory once
    """
    work = f"""
        kept = safetensors_torch.{call.format(path=path)}["30.{kept}"]
        assert bool((kept == 30).all())
    """
    # Small tensors share a block of 2 MiB; large ones are freed in pieces of 2 MiB, and may span two.
    assert growth(setup, work) < 4 * MIB + MIB


def loaded_into_own_memory(path: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path, backend="pread"), load(path.read_bytes())]


def test_neighbours_in_a_file_do_not_share_memory(tmp_path: Path) -> None:
    sizes = [1, 3, 0, 64, 65, 4096, 100_003, 3 * MIB + 1]
    tensors = {f"t{size}": torch.arange(size).remainder(250).to(torch.uint8) for size in sizes}
    save_file(tensors, tmp_path / "many")
    for loaded in loaded_into_own_memory(tmp_path / "many"):
        for name, tensor in loaded.items():
            storage = tensor.untyped_storage()
            assert storage.nbytes() == tensor.nbytes
            assert tensor.data_ptr() % 64 == 0
            assert tensor.data_ptr() == storage.data_ptr()
            tensor.fill_(255)
            others = {other: value for other, value in loaded.items() if other != name}
            assert all(torch.equal(value, tensors[other]) for other, value in others.items())
            tensor.copy_(tensors[name])


def test_a_tensor_outlives_its_neighbours(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100_000,), i) for i in range(40)}
    save_file(tensors, tmp_path / "many")
    for loaded in loaded_into_own_memory(tmp_path / "many"):
        kept = loaded["t7"]
        del loaded
        gc.collect()
        _overwrite_free_memory()
        assert torch.equal(kept, tensors["t7"])


def _overwrite_free_memory() -> None:
    for size in (64, 4096, 800_000, 32 * MIB):
        torch.full((size,), 255, dtype=torch.uint8)


def test_tensors_in_own_memory_can_grow(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.arange(4.0, 8.0)}, tmp_path / "two")
    for loaded in loaded_into_own_memory(tmp_path / "two"):
        loaded["a"].resize_(1000)
        assert loaded["a"][:4].tolist() == [0, 1, 2, 3]
        loaded["a"].fill_(9)
        assert loaded["b"].tolist() == [4, 5, 6, 7]


def test_reused_memory_is_overwritten(tmp_path: Path) -> None:
    """Reused memory must not show its former contents."""
    for value in (1, 2):
        save_file({f"t{i}": torch.full((MIB,), value, dtype=torch.uint8) for i in range(8)}, tmp_path / "same")
        for loaded in loaded_into_own_memory(tmp_path / "same"):
            assert all(bool((tensor == value).all()) for tensor in loaded.values())


HUGE = 2**42
memory_has_an_end = pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1", reason="this machine promises any memory"
)


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A file with a tensor that is larger than the memory."""
    header = b'{"huge":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (HUGE // 4, HUGE)
    header += b" " * (-len(header) % 8)
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + HUGE)
    return path


@memory_has_an_end
def test_more_memory_than_there_is(huge: Path) -> None:
    with pytest.raises(MemoryError, match=f"{HUGE} bytes"):
        load_file(huge, backend="pread")
    assert load_file(huge, prefault=False)["huge"].shape == (HUGE // 4,), "mapped, it takes none"


@memory_has_an_end
def test_more_memory_than_there_is_for_a_part_or_a_copy(huge: Path) -> None:
    with safe_open(huge, backend="pread") as file:
        assert file.get_slice("huge")[:3].tolist() == [0, 0, 0]
        with pytest.raises(MemoryError, match=f"slice of tensor 'huge' of {HUGE - 4} bytes"):
            file.get_slice("huge")[1:]
        with pytest.raises(MemoryError, match=f"{HUGE} bytes"):
            file.get_tensor("huge")
    with pytest.raises(MemoryError, match=f"tensor 'huge' of {HUGE // 2} bytes"):
        load_file(huge, dtype=torch.float16)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_cycle_collector_is_restored(enabled: bool, path: Path) -> None:
    data = path.read_bytes()
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        load_file(path)
        load(data)
        with pytest.raises(SafetensorError):
            load(b"")
        with pytest.raises(FileNotFoundError):
            load_file(path.with_name("absent"))
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()


def test_many_small_tensors_round_trip(tmp_path: Path) -> None:
    """There are more tensors than one vectored read or write can have."""
    tensors = {f"layer.{i}.weight": torch.full((i % 5,), float(i)) for i in range(5000)}
    save_file(tensors, tmp_path / "many")
    assert save(tensors) == (tmp_path / "many").read_bytes()
    for backend in ("mmap", "pread"):
        loaded = safetensors_torch.load_file(tmp_path / "many", backend=backend)
        assert len(loaded) == len(tensors)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def odd_complex(directory: Path) -> Path:
    """Writes a file of another writer, whose two complex numbers begin 4 bytes past a multiple of 8."""
    value = torch.tensor([1 + 2j, 3 + 4j], dtype=torch.complex64)
    json = b'{"z":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}'
    json += b" " * (-(len(json) + 4) % 8)
    path = directory / "odd"
    path.write_bytes(struct.pack("<Q", len(json)) + json + bytes(value.view(torch.uint8).tolist()))
    return path


def test_complex_numbers_are_aligned_as_torch_wants_them(tmp_path: Path, backend: str) -> None:
    path = odd_complex(tmp_path)
    data = bytearray(path.read_bytes())
    with safe_open(path, "pt", backend=backend) as file:
        found = [file.get_tensor("z"), load_file(path, backend=backend)["z"], load(data, copy=False)["z"]]
    for tensor in found:
        assert tensor.data_ptr() % 8 == 0
        assert tensor.tolist() == [1 + 2j, 3 + 4j]
