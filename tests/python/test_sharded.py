"""load_sharded, save_sharded and models in directories. The tests of the core cover the contents of an index."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from safetensors_torch import (
    SafetensorError,
    load_file,
    load_model,
    load_sharded,
    safe_open,
    save_file,
    save_model,
    save_sharded,
    set_transfer_options,
    transfer_options,
)
from safetensors_torch._sharded import parse_size

INDEX = "model.safetensors.index.json"


def state() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.int64), "c": torch.zeros(0)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def entries(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("prefault", [None, True, False])
def test_what_is_saved_is_loaded(tmp_path: Path, backend: str, prefault: Any) -> None:
    names = save_sharded(state(), tmp_path / "new", max_shard_size=32)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    assert entries(tmp_path / "new") == sorted(names)
    for path in (tmp_path / "new", tmp_path / "new" / INDEX, os.fsencode(tmp_path / "new")):
        assert_equal(load_sharded(path, backend=backend, prefault=prefault), state())
    # One file is a checkpoint too.
    assert_equal(load_sharded(tmp_path / "new" / names[0], backend=backend), {"b": state()["b"]})


def test_every_file_has_the_metadata(tmp_path: Path) -> None:
    given = {"k": "v"}
    for name in save_sharded(state(), tmp_path, given, max_shard_size="32B", stem="weights")[:-1]:
        assert name.startswith("weights-0000")
        with safe_open(tmp_path / name) as file:
            assert file.metadata() == {"format": "pt", "k": "v"}
    assert given == {"k": "v"}
    save_sharded(state(), tmp_path, {"format": "np"}, stem="weights")
    with safe_open(tmp_path / "weights.safetensors") as file:
        assert file.metadata() == {"format": "np"}


def test_a_part_is_loaded(tmp_path: Path) -> None:
    save_sharded(state(), tmp_path, max_shard_size=32)
    assert_equal(load_sharded(tmp_path, names=["a"]), {"a": state()["a"]})
    assert set(load_sharded(tmp_path, names=lambda name: name < "c", backend="pread")) == {"a", "b"}
    assert load_sharded(tmp_path, dtype=torch.bfloat16)["b"].dtype == torch.bfloat16
    assert load_sharded(tmp_path, "meta")["b"].is_meta
    with pytest.raises(SafetensorError, match=rf"{INDEX}: File does not contain tensor absent"):
        load_sharded(tmp_path, names=["absent"])


def test_progress_goes_over_all_files(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    names = save_sharded(state(), tmp_path, max_shard_size=32, progress=lambda *figures: told.append(figures))
    size = sum((tmp_path / name).stat().st_size for name in names[:-1])
    assert told[-1] == (size, size)
    load_sharded(tmp_path, backend="pread", progress=lambda *figures: told.append(figures))
    assert told[-1] == (56, 56)


def open_files(directory: Path) -> int:
    """Returns how many files in ``directory``, with names or without, this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).startswith(f"{directory}/") for link in links if link.is_symlink())


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = transfer_options().threads
    set_transfer_options(threads=2)
    yield
    set_transfer_options(threads=before)


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_files_are_written_at_once_as_there_are_threads(
    tmp_path: Path, threads: int, two_threads: None
) -> None:
    set_transfer_options(threads=threads)
    # One step of a thread writes 64 MiB.
    tensors = {f"t{i}": torch.full((70 << 20,), i, dtype=torch.uint8) for i in range(3)}
    arguments = (list(tensors), list(tensors.values()), {}, str(tmp_path), "model", 70 << 20, False, "error", False)
    save = torch.classes.safetensors_torch.PendingShardedSave(*arguments)
    assert not save.advance(0.0)
    assert open_files(tmp_path) == threads
    assert save.done() <= threads * (64 << 20) + 4096
    save.cancel()
    assert open_files(tmp_path) == 0 and entries(tmp_path) == []


def test_files_that_need_copies_are_written_among_others(tmp_path: Path, two_threads: None) -> None:
    tensors = {f"t{i}": torch.randn(1200, 1024) for i in range(8)}
    tensors["t0"], tensors["t4"] = tensors["t0"].T, tensors["t4"].T
    seen: list[int] = []
    names = save_sharded(
        tensors, tmp_path, max_shard_size="6MB", force_contiguous=True, progress=lambda done, _: seen.append(done)
    )
    assert len(names) == 9 and seen == sorted(seen)
    assert_equal(load_sharded(tmp_path), tensors)
    files = sum((tmp_path / name).stat().st_size for name in names[:-1])
    assert seen[-1] == files


def test_a_full_disk_stops_all_threads(tmp_path: Path, two_threads: None) -> None:
    tensors = {f"t{i}": torch.zeros(5 << 20, dtype=torch.uint8) for i in range(6)}
    save_sharded(state(), tmp_path)
    before = entries(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_sharded(tensors, tmp_path, max_shard_size=5 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_files(tmp_path) == 0 and entries(tmp_path) == before
    assert_equal(load_sharded(tmp_path), state())


def test_the_mode_of_fake_tensors_sees_shapes(tmp_path: Path) -> None:
    save_sharded(state(), tmp_path, max_shard_size=32)
    with FakeTensorMode():
        tensors = load_sharded(tmp_path, names=["c", "b"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"b": (2, 3), "c": (0,)}


def test_the_index_is_not_trusted(tmp_path: Path) -> None:
    directory = tmp_path / "inner"
    names = save_sharded(state(), directory, max_shard_size=32)
    text = (directory / INDEX).read_text()
    save_file({"b": torch.ones(1)}, tmp_path / "secret.safetensors")
    (directory / INDEX).write_text(text.replace(names[0], "../secret.safetensors"))
    with pytest.raises(SafetensorError, match=r"'?b'?.*\.\./secret\.safetensors"):
        load_sharded(directory)
    (directory / INDEX).write_text(text.replace(names[0], names[1]))
    with pytest.raises(SafetensorError, match=rf'tensor "b" into shard "{names[1]}"'):
        load_sharded(directory)
    (directory / INDEX).write_text(text)
    (directory / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{names[1]}.*{INDEX}"):
        load_sharded(directory)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"b": 1}}))
    with pytest.raises(SafetensorError, match=rf"{INDEX}.*the file of tensor"):
        load_sharded(directory)
    (directory / INDEX).unlink()
    (directory / names[0]).unlink()
    with pytest.raises(SafetensorError, match="no checkpoint"):
        load_sharded(directory)


def test_load_file_recommends_load_sharded(tmp_path: Path) -> None:
    save_sharded(state(), tmp_path, max_shard_size=32)
    with pytest.raises(IsADirectoryError, match="load_sharded"):
        load_file(tmp_path)
    with pytest.raises(SafetensorError, match="load_sharded"):
        load_file(tmp_path / INDEX)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_shard_size": 0}, ValueError),
        ({"max_shard_size": "5 parsecs"}, ValueError),
        ({"max_shard_size": 1.5}, TypeError),
        ({"max_shard_size": True}, TypeError),
        ({"stem": "a/b"}, SafetensorError),
        ({"stem": "m-00001-of-00002"}, SafetensorError),
        ({"stem": b"m"}, TypeError),
        ({"durable": 1}, TypeError),
        ({"progress": 7}, TypeError),
        ({"metadata": {"k": 1}}, TypeError),
    ],
)
def test_arguments_that_cannot_be(tmp_path: Path, arguments: dict[str, Any], error: type[Exception]) -> None:
    before = save_sharded(state(), tmp_path / "d", max_shard_size=32)
    with pytest.raises(error):
        save_sharded({"x": torch.ones(1)}, tmp_path / "d", **arguments)
    assert entries(tmp_path / "d") == sorted(before)


def test_what_save_file_refuses(tmp_path: Path) -> None:
    whole = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save_sharded({"a": whole, "b": whole}, tmp_path / "d", max_shard_size=16)
    with pytest.raises(ValueError, match="Expected a dict"):
        save_sharded([whole], tmp_path / "d")  # type: ignore[arg-type]
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("7", 7), ("7B", 7), ("5GB", 5 * 10**9), ("2 kib", 2048), ("1.5MB", 1_500_000), (" 1TiB ", 1 << 40)],
)
def test_sizes(size: Any, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "1e3", "0", -1, "0.5", 1 << 63, "9999999TB", "1 G B", "\u0665GB"])
def test_invalid_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match="a size"):
        parse_size(size)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(4)


class Hooked(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(lambda module, keys: None)


@pytest.mark.parametrize("kind", [Tied, Hooked])
def test_models_in_directories(tmp_path: Path, kind: type[Tied]) -> None:
    model, other = kind(), kind()
    save_model(model, tmp_path / "m", max_shard_size=64)
    assert INDEX in entries(tmp_path / "m") and len(entries(tmp_path / "m")) > 2
    for path in (tmp_path / "m", tmp_path / "m" / INDEX):
        torch.nn.init.zeros_(other.first.weight)
        assert load_model(other, path) == (set(), [])
        assert torch.equal(other.second.weight, model.first.weight)
    # An existing directory needs no size.
    save_model(model, tmp_path / "m")
    assert entries(tmp_path / "m") == ["model.safetensors"]
    with safe_open(tmp_path / "m" / "model.safetensors") as file:
        assert file.metadata() == {"second.weight": "first.weight", "format": "pt"}
    assert load_model(other, tmp_path / "m") == (set(), [])
    with pytest.raises(ValueError, match="force_contiguous=True"):
        model.first.weight.data = model.first.weight.data.t()
        save_model(model, tmp_path / "m", force_contiguous=False)


def test_an_index_that_lists_a_part_of_its_files(tmp_path: Path, backend: str) -> None:
    names = save_sharded(state(), tmp_path, max_shard_size=32)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["a"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(SafetensorError, match='holds tensor "a".*set `extra` to "ignore"'):
        load_sharded(tmp_path, backend=backend)
    rest = {name: tensor for name, tensor in state().items() if name != "a"}
    for path in (tmp_path, tmp_path / INDEX):
        assert_equal(load_sharded(path, backend=backend, extra="ignore"), rest)
    with pytest.raises(SafetensorError, match="does not contain tensor a"):
        load_sharded(tmp_path, names=["a"], extra="ignore")
    with FakeTensorMode():
        assert load_sharded(tmp_path, extra="ignore").keys() == rest.keys()
    model = torch.nn.Module()
    for name, tensor in rest.items():
        model.register_buffer(name, torch.zeros_like(tensor))
    assert load_model(model, tmp_path, backend=backend, extra="ignore") == (set(), [])
    assert_equal(dict(model.state_dict()), rest)
    assert "a" in load_file(tmp_path / names[0]) or "a" in load_file(tmp_path / names[1])
    for wrong in ("Ignore", "", None, "\udc80"):
        with pytest.raises(SafetensorError, match='choose "error" or "ignore"'):
            load_sharded(tmp_path, extra=wrong)  # type: ignore[arg-type]


def test_variants(tmp_path: Path, backend: str) -> None:
    """The names are those of diffusers and transformers; the tests of the core have all of them."""
    half = {name: tensor + 1 for name, tensor in state().items()}
    save_sharded(state(), tmp_path, max_shard_size=32, stem="diffusion_pytorch_model")
    save_sharded(half, tmp_path, max_shard_size=32, stem="diffusion_pytorch_model.fp16")
    index = "diffusion_pytorch_model.safetensors.index.fp16.json"
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors.index.json").rename(tmp_path / index)
    assert_equal(load_sharded(tmp_path, backend=backend), state())
    assert_equal(load_sharded(tmp_path, backend=backend, variant="fp16"), half)
    model = torch.nn.Module()
    for name, tensor in state().items():
        model.register_buffer(name, tensor.clone())
    assert load_model(model, tmp_path, backend=backend, variant="fp16") == (set(), [])
    assert_equal(dict(model.state_dict()), half)
    with pytest.raises(SafetensorError, match=r'no checkpoint of variant "bf16".*fp16\.json \(variant "fp16"\)'):
        load_sharded(tmp_path, variant="bf16")
    save_file(state(), tmp_path / "other.safetensors")
    with pytest.raises(
        SafetensorError, match="several checkpoints: open one by its path, .* it holds diffusion_pyt.*, o"
    ):
        load_sharded(tmp_path)
    with pytest.raises((SafetensorError, ValueError), match="this is a file"):
        load_sharded(tmp_path / "other.safetensors", variant="fp16")
    with pytest.raises(TypeError, match="variant must be a str"):
        load_sharded(tmp_path, variant=16)  # type: ignore[arg-type]
