"""The device argument of every function that has one, and the independence of torch's default device."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from random_state import difference
from safetensors_torch import SafetensorError, load, load_file, load_model, safe_open, save, save_file, save_model
from support import bytes_read, encode, entry, pack, snapshot

ACCELERATOR = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
if ACCELERATOR is None and torch.cuda.is_available():
    ACCELERATOR = torch.device("cuda")
HAS_ACCELERATOR = ACCELERATOR is not None and (
    torch.cuda.is_available() if ACCELERATOR.type == "cuda" else torch.accelerator.is_available()
)
on_accelerator = pytest.mark.skipif(not HAS_ACCELERATOR, reason="no accelerator")
without_accelerator = pytest.mark.skipif(HAS_ACCELERATOR, reason="an accelerator is there")


def through_get_tensor(path: Path, device: object, backend: str) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt", device, backend=backend) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def through_get_tensors(path: Path, device: object, backend: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt", device=device, backend=backend) as file:
        return file.get_tensors()


def through_get_slice(path: Path, device: object, backend: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt", device=device, backend=backend) as file:
        return {name: file.get_slice(name)[...] for name in file.keys()}


READERS = {
    "load_file": lambda path, device, backend: load_file(path, device, backend=backend),
    "load": lambda path, device, backend: load(path.read_bytes(), device),
    "get_tensor": through_get_tensor,
    "get_tensors": through_get_tensors,
    "get_slice": through_get_slice,
}
# Only CPU tensors can share memory.
SHARED = {"load without a copy": lambda path, device, backend: load(bytearray(path.read_bytes()), device, copy=False)}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)
every_cpu_reader = pytest.mark.parametrize("read", [*READERS.values(), *SHARED.values()], ids=[*READERS, *SHARED])


def read_model(path: Path, device: object, backend: str) -> None:
    load_model(nn.Module(), path, strict=False, device=device, backend=backend)


with_model = pytest.mark.parametrize("read", [*READERS.values(), read_model], ids=[*READERS, "load_model"])


@every_cpu_reader
@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)], ids=repr)
def test_cpu_by_every_name(read: Callable, device: object, path: Path, tensors: dict, backend: str) -> None:
    loaded = read(path, device, backend)
    assert {tensor.device.type for tensor in loaded.values()} == {"cpu"}
    assert difference(loaded, tensors) is None


@every_reader
@pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=repr)
def test_meta_gives_shapes_and_dtypes(read: Callable, device: object, path: Path, tensors: dict, backend: str) -> None:
    loaded = read(path, device, backend)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in loaded.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }
    assert all(tensor.is_meta for tensor in loaded.values())


def test_shared_memory_is_on_the_cpu_only(path: Path) -> None:
    """It does not return tensors on another device instead."""
    with pytest.raises(ValueError, match=r"copy=False.*\bmeta\b"):
        load(bytearray(path.read_bytes()), "meta", copy=False)


SIZE = 256 << 20


@pytest.fixture
def large(write: Callable[..., Path]) -> Path:
    """A sparse file of 256 MiB with no page in the page cache."""
    path = write(pack({"a": entry("F32", [SIZE // 4], 0, SIZE)}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + SIZE)
    return path


def cached_bytes(path: Path) -> int:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        memory = (ctypes.c_char * len(view)).from_buffer(view)
        assert ctypes.CDLL(None).mincore(ctypes.byref(memory), ctypes.c_size_t(len(view)), pages) == 0
        del memory
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("read", [READERS["load_file"], through_get_tensor, through_get_slice])
def test_meta_reads_no_data(read: Callable, large: Path, backend: str) -> None:
    before = bytes_read()
    assert read(large, "meta", backend)["a"].shape == (SIZE // 4,)
    assert bytes_read() - before < SIZE // 16
    assert cached_bytes(large) < SIZE // 16


def test_the_measures_detect_reads(large: Path) -> None:
    """The two measures above detect reads."""
    before = bytes_read()
    assert not load_file(large, backend="pread")["a"].any()
    assert bytes_read() - before >= SIZE or cached_bytes(large) >= SIZE // 2
    assert not load_file(large, backend="mmap")["a"].any()
    assert cached_bytes(large) >= SIZE // 2


@pytest.fixture(params=["default device", "with block"])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch creates tensors on the meta device."""
    if request.param == "with block":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@every_cpu_reader
@pytest.mark.parametrize("device", [None, "cpu"], ids=repr)
def test_default_device_is_ignored(
    read: Callable, device: object, path: Path, tensors: dict, backend: str, elsewhere: None
) -> None:
    assert torch.empty(1).is_meta
    assert difference(read(path, device, backend), tensors) is None


def test_default_device_is_ignored_without_an_argument(
    path: Path, tensors: dict, backend: str, elsewhere: None
) -> None:
    assert difference(load_file(path, backend=backend), tensors) is None
    assert difference(load(path.read_bytes()), tensors) is None
    with safe_open(path, backend=backend) as file:
        assert difference(file.get_tensors(), tensors) is None
        assert difference({"weight": file.get_slice("weight")[0]}, {"weight": tensors["weight"][0]}) is None
        assert difference({"steps": file.get_slice("steps")[[0, 2]]}, {"steps": tensors["steps"][[0, 2]]}) is None


def test_default_device_is_ignored_on_save(path: Path, tensors: dict, elsewhere: None) -> None:
    assert save(tensors, {"format": "pt"}) == path.read_bytes()
    save_file(tensors, path.parent / "a", {"format": "pt"})
    assert (path.parent / "a").read_bytes() == path.read_bytes()


def test_default_device_is_ignored_by_models(tmp_path: Path, backend: str) -> None:
    source, model = nn.Linear(2, 2), nn.Linear(2, 2).half()
    hooked = nn.Linear(2, 2)
    hooked.register_load_state_dict_pre_hook(lambda *arguments: None)
    with torch.device("meta"):
        save_model(source, tmp_path / "a")
        load_model(model, tmp_path / "a", backend=backend)
        load_model(hooked, tmp_path / "a", backend=backend)
    assert torch.equal(model.weight, source.weight.half())
    assert difference(snapshot(hooked), snapshot(source)) is None


@with_model
@pytest.mark.parametrize("device", [-1, -5])
def test_negative_int(read: Callable, device: int, path: Path, backend: str) -> None:
    with pytest.raises((SafetensorError, RuntimeError, ValueError), match=str(device)):
        read(path, device, backend)


@with_model
@pytest.mark.parametrize("device", ["nope", "cpu:x", "", "CPU "])
def test_unknown_device(read: Callable, device: str, path: Path, backend: str) -> None:
    with pytest.raises((SafetensorError, RuntimeError, ValueError), match=device or "(?i)device"):
        read(path, device, backend)


@with_model
@pytest.mark.parametrize("device", [1.5, ["cpu"], {}], ids=repr)
def test_values_that_are_not_devices(read: Callable, device: object, path: Path, backend: str) -> None:
    with pytest.raises((SafetensorError, TypeError, ValueError)):
        read(path, device, backend)


@without_accelerator
@every_reader
@pytest.mark.parametrize("device", [0, 1])
def test_int_without_an_accelerator(read: Callable, device: int, path: Path, backend: str) -> None:
    with pytest.raises((SafetensorError, RuntimeError, ValueError), match="(?i)accelerator|device|driver"):
        read(path, device, backend)


@without_accelerator
@every_reader
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_cuda(read: Callable, device: str, path: Path, backend: str) -> None:
    with pytest.raises((SafetensorError, RuntimeError, AssertionError), match="(?i)cuda|nvidia|accelerator"):
        read(path, device, backend)


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", torch.device("cpu")], ids=repr)
def test_models_stay_where_they_are(device: object, write: Callable[..., Path], backend: str) -> None:
    model, state = nn.Linear(2, 2), {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    assert load_model(model, write(state), True, device, backend=backend) == (set(), [])
    assert difference(snapshot(model), state) is None


@on_accelerator
@every_reader
@pytest.mark.parametrize("kind", ["name", "index", "int", "device"])
def test_accelerator(read: Callable, kind: str, path: Path, tensors: dict, backend: str) -> None:
    device = {
        "name": ACCELERATOR.type,
        "index": f"{ACCELERATOR.type}:0",
        "int": 0,
        "device": torch.device(ACCELERATOR.type, 0),
    }[kind]
    loaded = read(path, device, backend)
    assert {tensor.device for tensor in loaded.values()} == {torch.device(ACCELERATOR.type, 0)}
    assert difference({name: tensor.cpu() for name, tensor in loaded.items()}, tensors) is None


@on_accelerator
def test_save_from_an_accelerator(path: Path, tensors: dict) -> None:
    moved = {name: tensor.to(ACCELERATOR) for name, tensor in tensors.items()}
    assert save(moved) == encode(tensors)
    save_file(moved, path)
    assert path.read_bytes() == encode(tensors)


@on_accelerator
def test_model_on_an_accelerator(tmp_path: Path, backend: str) -> None:
    source, model = nn.Linear(40, 50), nn.Linear(40, 50).to(ACCELERATOR)
    save_model(source, tmp_path / "a")
    pointer = model.weight.data_ptr()
    assert load_model(model, tmp_path / "a", backend=backend) == (set(), [])
    assert model.weight.data_ptr() == pointer and model.weight.device.type == ACCELERATOR.type
    assert difference({name: value.cpu() for name, value in snapshot(model).items()}, snapshot(source)) is None
    save_model(model, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
