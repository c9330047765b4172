"""safetensors_torch.distributed with URLs: four processes that share a bucket, and one process with fsspec's memory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

import ranks
import safetensors_torch
from safetensors_torch import distributed as std

# torch says so in each save and load of a program that has no group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5), "scalar": torch.tensor(2.5)}


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_four_processes(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", bucket)
    errors = ranks.run("distributed_remote_cases", 4, tmp_path)
    assert not errors, "\n".join(f"{name}: {text}" for name, text in errors.items())


def test_one_process(memory: Any, tmp_path: Path) -> None:
    seen = []
    names = std.save(TENSORS, "memory://a/b", {"k": "v"}, max_shard_size=40, progress=lambda *done: seen.append(done))
    safetensors_torch.save_sharded(TENSORS, tmp_path, {"k": "v"}, max_shard_size=40)
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted(names)
    for name in names:
        assert memory.cat_file(f"/a/b/{name}") == (tmp_path / name).read_bytes()
    assert seen[-1] == (sum((tmp_path / name).stat().st_size for name in names[:-1]),) * 2
    for url in ("memory://a/b", f"memory://a/b/{names[-1]}"):
        target = zeros()
        assert std.load_into(target, url) == ([], [])
        assert same(target, TENSORS)
    target = {"b": torch.zeros(5, dtype=torch.int64)}
    dcp.load(target, storage_reader=std.HuggingFaceStorageReader(f"memory://a/b/{names[1]}"))
    assert torch.equal(target["b"], TENSORS["b"])
    memory.rm("/a/b/" + names[0])
    with pytest.raises(FileNotFoundError, match=f"^memory://a/b/{names[0]}"):
        std.load_into(zeros(), "memory://a/b")
    memory.rm("/a/b/" + names[-1])
    with pytest.raises(safetensors_torch.SafetensorError, match=f"^memory://a/b: .*{names[0]} is missing"):
        std.load_into(zeros(), "memory://a/b")
    with pytest.raises(FileNotFoundError, match="^memory://a/none: "):
        std.load_into(zeros(), "memory://a/none")


@pytest.mark.parametrize("layout", ["final", "shards"])
def test_dcp(layout: str, memory: Any) -> None:
    writer = std.HuggingFaceStorageWriter("memory://x", layout=layout)
    dcp.save(dict(TENSORS), storage_writer=pickle.loads(pickle.dumps(writer)))
    for reader in (std.HuggingFaceStorageReader("memory://x"), std.HuggingFaceStorageReader("x", filesystem=memory)):
        target = zeros()
        dcp.load(target, storage_reader=pickle.loads(pickle.dumps(reader)))
        assert same(target, TENSORS)
    dcp.save({"c": torch.ones(2)}, checkpoint_id="memory://y", storage_writer=writer)
    target = {"c": torch.zeros(2)}
    dcp.load(target, checkpoint_id="memory://y", storage_reader=std.HuggingFaceStorageReader("memory://none"))
    assert torch.equal(target["c"], torch.ones(2))
    with pytest.raises(dcp.api.CheckpointException, match="'step' is not a tensor"):
        dcp.save({"step": 1}, storage_writer=writer)


def test_a_path_after_a_url(memory: Any, tmp_path: Path) -> None:
    """The objects of torch.distributed.checkpoint get a new place with each call."""
    std.save(TENSORS, tmp_path)
    std.save({"b": torch.arange(5)}, "memory://m")
    reader = std.HuggingFaceStorageReader("memory://m")
    for place in (tmp_path, "memory://m", str(tmp_path), None):
        target = {"b": torch.zeros(5, dtype=torch.int64)}
        dcp.load(target, checkpoint_id=place, storage_reader=reader)
        assert torch.equal(target["b"], TENSORS["b"])
    assert reader.checkpoint_id == tmp_path
    assert reader.validate_checkpoint_id("memory://m") and std.HuggingFaceStorageWriter.validate_checkpoint_id("s3://b")


def test_consolidated_directories(memory: Any) -> None:
    writer = std.HuggingFaceStorageWriter("memory://x", layout="shards", enable_consolidation=True)
    dcp.save(dict(TENSORS), storage_writer=writer)
    assert memory.ls("/x/sharded", detail=False) == ["/x/sharded/shard-00001-model-00001-of-00001.safetensors"]
    assert writer.consolidated_output_path == "memory://x"


def test_plans_of_one_process_alone_cannot_make_final_files(memory: Any) -> None:
    with pytest.raises(ValueError, match="use_collectives=True"):
        dcp.save(
            dict(TENSORS),
            storage_writer=std.HuggingFaceStorageWriter("memory://x", layout="final"),
            use_collectives=False,
        )


def test_quantized_weights(memory: Any) -> None:
    """The scales are in another file than their weights."""
    weight, scales = torch.randn(8, 8).to(torch.float8_e4m3fn), torch.rand(2, 2)
    files = {"w.weight": "model-1.safetensors", "w.weight_scale_inv": "model-2.safetensors"}
    safetensors_torch.save_file({"w.weight": weight}, "memory://q/model-1.safetensors")
    safetensors_torch.save_file({"w.weight_scale_inv": scales}, "memory://q/model-2.safetensors")
    memory.pipe("/q/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": files}).encode())
    target = {"w.weight": torch.zeros(8, 8)}
    dcp.load(target, storage_reader=std.QuantizedHuggingFaceStorageReader("memory://q", block_size=4))
    assert torch.equal(target["w.weight"], weight.float() * scales.repeat_interleave(4, 0).repeat_interleave(4, 1))


def test_an_argument_that_is_no_filesystem() -> None:
    for call in (
        lambda: std.save(TENSORS, "x", filesystem=3),
        lambda: std.load_into(zeros(), "x", filesystem=3),
    ):
        with pytest.raises(TypeError, match="filesystem must be a store of obstore or a filesystem of fsspec"):
            call()
