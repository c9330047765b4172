"""What programs expect of torch's storage for Hugging Face files, in one process.

Each test runs with torch's own classes, with ours, and with ours in the place of torch's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _consolidate_hf_safetensors
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.storage import WriteResult

import safetensors_torch
from safetensors_torch import distributed as std

# torch says so in each save and load of a program that has no group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=["torch", "ours", "patched"])
def storage(request: pytest.FixtureRequest) -> Iterator[types.SimpleNamespace]:
    """The classes, and the function that consolidates."""
    patch = safetensors_torch.patch_safetensors(dcp=True) if request.param == "patched" else contextlib.nullcontext()
    with patch:
        classes = std if request.param == "ours" else dcp
        function = "consolidate_safetensors_files"
        yield types.SimpleNamespace(
            Writer=classes.HuggingFaceStorageWriter,
            Reader=classes.HuggingFaceStorageReader,
            QuantizedReader=classes.QuantizedHuggingFaceStorageReader,
            name=request.param,
            consolidate=std.consolidate if classes is std else getattr(_consolidate_hf_safetensors, function),
        )


@pytest.fixture
def state_dict() -> Tensors:
    return {"a": torch.rand(4), "b": torch.rand(3, 5), "c": torch.rand(2, dtype=torch.float64)}


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def zeros_like(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def save_plan(tensors: Tensors, storage_data: dict[str, Any]) -> tuple[SavePlan, dcp.DefaultSavePlanner]:
    """Returns a plan that no writer has prepared, and its planner."""
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(state_dict=tensors)
    return dataclasses.replace(planner.create_local_plan(), storage_data=storage_data), planner


def load_planner(tensors: Tensors) -> dcp.DefaultLoadPlanner:
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner(state_dict=tensors, metadata=Metadata(state_dict_metadata={}))
    return planner


def read_item(
    index: MetadataIndex, storage_offsets: list[int], dest_offsets: list[int], lengths: list[int]
) -> ReadItem:
    return ReadItem(
        type=LoadItemType.TENSOR,
        storage_index=index,
        dest_index=MetadataIndex(index.fqn, torch.Size([0] * len(lengths))),
        storage_offsets=torch.Size(storage_offsets),
        dest_offsets=torch.Size(dest_offsets),
        lengths=torch.Size(lengths),
    )


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_results_tell_where_each_tensor_is(storage: Any, state_dict: Tensors, tmp_path: Path) -> None:
    mapping = {"a": 2, "b": 1, "c": 2}
    names = {name: f"model-{number:05d}-of-00002.safetensors" for name, number in mapping.items()}
    writer = storage.Writer(str(tmp_path), mapping)
    plan, planner = save_plan(state_dict, {"fqn_to_index_mapping": mapping})
    results = writer.write_data(plan, planner).value()
    assert sorted(results, key=lambda result: result.index.fqn) == [
        WriteResult(
            index=MetadataIndex(name, torch.Size([0] * tensor.dim())),
            size_in_bytes=tensor.nbytes,
            storage_data=_StorageInfo(names[name], 0, tensor.nbytes),
        )
        for name, tensor in state_dict.items()
    ]
    writer.finish(Metadata(state_dict_metadata={}), [results])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": 16 + 60 + 16}, "weight_map": names}
    assert same(safetensors_torch.load_sharded(tmp_path), state_dict)


def test_results_tell_which_file_of_a_process_has_each_tensor(
    storage: Any, state_dict: Tensors, tmp_path: Path
) -> None:
    writer = storage.Writer(str(tmp_path), save_distributed=True)
    plan, planner = save_plan(state_dict, {"shard_index": 3})
    results = writer.write_data(plan, planner).value()
    found = {result.index.fqn: (result.size_in_bytes, result.storage_data) for result in results}
    name = "shard-00003-model-00001-of-00001.safetensors"
    assert found == {key: (tensor.nbytes, _StorageInfo(name, 0, tensor.nbytes)) for key, tensor in state_dict.items()}
    writer.finish(Metadata(state_dict_metadata={}), [results])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert same(safetensors_torch.load_file(tmp_path / name), state_dict)


def test_finish_writes_the_index_of_another_writers_results(storage: Any, tmp_path: Path) -> None:
    results = [
        [WriteResult(MetadataIndex(name), size, _StorageInfo(file, 0, size)) for name, size, file in files]
        for files in ([("a", 100, "first"), ("b", 20, "second")], [("c", 3, "second")])
    ]
    storage.Writer(str(tmp_path)).finish(Metadata(state_dict_metadata={}), results)
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 123},
        "weight_map": {"a": "first", "b": "second", "c": "second"},
    }


def test_metadata_has_each_tensor_and_its_file(storage: Any, state_dict: Tensors, tmp_path: Path) -> None:
    state_dict |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3, dtype=torch.bfloat16)}
    safetensors_torch.save_file(state_dict, tmp_path / "any.safetensors")
    metadata = storage.Reader(str(tmp_path)).read_metadata()
    origins = {name: torch.Size([0] * tensor.dim()) for name, tensor in state_dict.items()}
    assert metadata.state_dict_metadata == {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.dtype),
            size=tensor.size(),
            chunks=[ChunkStorageMetadata(offsets=origins[name], sizes=tensor.size())],
        )
        for name, tensor in state_dict.items()
    }
    found = {index: (info.relative_path, info.shape, info.dtype) for index, info in metadata.storage_data.items()}
    assert found == {
        MetadataIndex(name, origins[name]): (str(tmp_path / "any.safetensors"), tensor.size(), tensor.dtype)
        for name, tensor in state_dict.items()
    }


def save_rows_and_columns(directory: Path) -> torch.Tensor:
    """Saves a matrix as four processes do, once divided into rows and once into columns, and returns it."""
    matrix = torch.arange(16.0).reshape(4, 4)
    directory.mkdir()
    for rank in range(4):
        chunks = {"rows": matrix[rank : rank + 1].clone(), "columns": matrix[:, rank : rank + 1].contiguous()}
        positions = {"rows": {"saved_offsets": [rank, 0]}, "columns": {"saved_offsets": [0, rank]}}
        metadata = {"DCP_SHARDING_INFO": json.dumps(positions), "DCP_VERSION": "1.0", "format": "pt"}
        name = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        safetensors_torch.save_file(chunks, directory / name, metadata)
    return matrix


def test_metadata_has_the_chunks_of_all_processes(storage: Any, tmp_path: Path) -> None:
    save_rows_and_columns(tmp_path / "shards")
    metadata = storage.Reader(str(tmp_path / "shards")).read_metadata()
    for name, sizes, dim in (("rows", [1, 4], 0), ("columns", [4, 1], 1)):
        stored = metadata.state_dict_metadata[name]
        assert (stored.size, stored.properties.dtype) == (torch.Size([4, 4]), torch.float32)
        begins = sorted(stored.chunks, key=lambda chunk: chunk.offsets)
        for rank, chunk in enumerate(begins):
            offsets = [0, 0]
            offsets[dim] = rank
            assert chunk == ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            info = metadata.storage_data[MetadataIndex(name, torch.Size(offsets))]
            assert Path(info.relative_path).name == f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
            assert info.shape == torch.Size(sizes)
        assert len(begins) == 4


def test_a_plan_of_the_caller_is_read(storage: Any, tmp_path: Path) -> None:
    """The caller has the metadata from elsewhere: this reader has read none."""
    whole = torch.arange(12.0).reshape(3, 4)
    safetensors_torch.save_file({"w": whole, "other": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    storage_data = storage.Reader(str(tmp_path)).read_metadata().storage_data
    reader = storage.Reader(str(tmp_path))
    reader.storage_data = storage_data
    target = {"w": torch.zeros(4, 6)}
    item = read_item(MetadataIndex("w", torch.Size([0, 0])), [1, 1], [2, 3], [2, 3])
    assert reader.read_data(LoadPlan([item]), load_planner(target)).value() is None
    expected = torch.zeros(4, 6)
    expected[2:4, 3:6] = whole[1:3, 1:4]
    assert torch.equal(target["w"], expected)


def test_one_process_saves_one_file_and_an_index(storage: Any, tmp_path: Path) -> None:
    modules = [torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.EmbeddingBag(5, 10)) for _ in range(2)]
    saved = {name: tensor.clone() for name, tensor in modules[0].state_dict().items()}
    dcp.save(modules[0].state_dict(), storage_writer=storage.Writer(str(tmp_path)))
    name = "model-00001-of-00001.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, INDEX]
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == dict.fromkeys(saved, name)
    assert same(safetensors_torch.load_file(tmp_path / name), saved)
    dcp.load(modules[1].state_dict(), storage_reader=storage.Reader(str(tmp_path)))
    assert same(dict(modules[1].state_dict()), saved)


def test_an_empty_state_dict_gets_all_tensors(storage: Any, state_dict: Tensors, tmp_path: Path) -> None:
    safetensors_torch.save_file(state_dict, tmp_path / "model-00001-of-00001.safetensors")
    loaded = _load_state_dict_from_keys(storage_reader=storage.Reader(str(tmp_path)))
    assert same(loaded, state_dict)


def test_counts_of_threads_are_accepted(storage: Any, state_dict: Tensors, tmp_path: Path) -> None:
    mapping = {"a": 1, "b": 2, "c": 3}
    writer = storage.Writer(str(tmp_path), mapping, thread_count=2, thread_count_consolidation=2)
    dcp.save(state_dict, storage_writer=writer)
    target = zeros_like(state_dict)
    dcp.load(target, storage_reader=storage.Reader(str(tmp_path), thread_count=3))
    assert same(target, state_dict)


@pytest.mark.parametrize("mapping", [{"rows": 1, "columns": 1}, {"rows": 1, "columns": 2}])
def test_consolidation_writes_the_files_of_the_mapping(storage: Any, mapping: dict[str, int], tmp_path: Path) -> None:
    matrix = save_rows_and_columns(tmp_path / "shards")
    target = tmp_path / "whole"
    target.mkdir()
    storage.consolidate(str(tmp_path / "shards"), str(target), fqn_to_index_mapping=mapping)
    count = max(mapping.values())
    names = {name: f"model-{number:05d}-of-{count:05d}.safetensors" for name, number in mapping.items()}
    assert {path.name for path in target.iterdir()} == {*names.values(), INDEX}
    index = json.loads((target / INDEX).read_text())
    assert index == {"metadata": {"total_size": 2 * 16 * 4}, "weight_map": names}
    for name in names.values():
        loaded = safetensors_torch.load_file(target / name)
        assert same(loaded, {key: matrix for key in mapping if names[key] == name})
    assert len(list((tmp_path / "shards").iterdir())) == 4


def scaled(weight: torch.Tensor, scales: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a weight times the scale of each of its blocks."""
    factors = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (weight.float() * factors[: weight.shape[0], : weight.shape[1]]).to(dtype)


@pytest.mark.parametrize("weights", [torch.float32, torch.float8_e4m3fn])
def test_quantized_weights_are_scaled_block_by_block(storage: Any, weights: torch.dtype, tmp_path: Path) -> None:
    """The scales are in the file of their weight, or in another one; sizes are not multiples of a block."""
    generator = torch.Generator().manual_seed(0)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    near, far = (torch.randn(*shape, generator=generator).to(weights) for shape in ((8, 8), (7, 10)))
    near_scales, far_scales = (torch.rand(*shape, generator=generator) + 0.5 for shape in ((2, 2), (2, 3)))
    plain = torch.randn(6, generator=generator)
    content = {"near.weight": near, "near.weight_scale_inv": near_scales, "far.weight": far}
    safetensors_torch.save_file(content, tmp_path / first)
    safetensors_torch.save_file({"far.weight_scale_inv": far_scales, "plain.weight": plain}, tmp_path / second)
    far_names = {"far.weight_scale_inv": second, "plain.weight": second}
    write_index(tmp_path, {**dict.fromkeys(content, first), **far_names})

    target = {"near.weight": torch.zeros(8, 8), "far.weight": torch.zeros(7, 10), "plain.weight": torch.zeros(6)}
    reader = storage.QuantizedReader(str(tmp_path), 2, torch.float32, 4)
    dcp.load(target, storage_reader=reader)
    expected = {
        "near.weight": scaled(near, near_scales, 4, torch.float32),
        "far.weight": scaled(far, far_scales, 4, torch.float32),
        "plain.weight": plain,
    }
    assert same(target, expected)

    target = {"far.weight": torch.zeros(7, 10, dtype=torch.float64)}
    reader = storage.QuantizedReader(str(tmp_path), target_dtype=torch.bfloat16, block_size=4)
    dcp.load(target, storage_reader=reader)
    assert torch.equal(target["far.weight"], scaled(far, far_scales, 4, torch.bfloat16).double())

    # Rows 2 to 5 and columns 1 to 8 have elements of six blocks.
    target = {"far.weight": torch.zeros(4, 8)}
    reader = storage.QuantizedReader(str(tmp_path), block_size=4)
    reader.set_up_storage_reader(reader.read_metadata(), False)
    item = read_item(MetadataIndex("far.weight", torch.Size([0, 0])), [2, 1], [0, 0], [4, 8])
    reader.read_data(LoadPlan([item]), load_planner(target))
    assert torch.equal(target["far.weight"], expected["far.weight"][2:6, 1:9])


def test_blocks_of_four_bits_are_dequantized(storage: Any, tmp_path: Path) -> None:
    """A byte has two values of four bits, the lower one first; 16 bytes share a power of two."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 3, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (2, 3, 4), dtype=torch.uint8, generator=generator)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    safetensors_torch.save_file({"w_blocks": blocks}, tmp_path / names[0])
    safetensors_torch.save_file({"w_scales": scales}, tmp_path / names[1])
    write_index(tmp_path, {"w_blocks": names[0], "w_scales": names[1]})
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1)
    whole = torch.ldexp(pairs.reshape(2, 3, 4, 32), (scales.int() - 127).unsqueeze(-1)).reshape(2, 3, 128)

    reader = storage.QuantizedReader(str(tmp_path))
    metadata = reader.read_metadata()
    stored = metadata.state_dict_metadata["w_blocks"]
    assert stored.size == whole.size()
    reader.set_up_storage_reader(metadata, False)
    target = {"w_blocks": torch.zeros(1, 2, 60)}
    # Values 20 to 79 of each row are in groups 0, 1 and 2.
    item = read_item(MetadataIndex("w_blocks", stored.chunks[0].offsets), [1, 1, 20], [0, 0, 0], [1, 2, 60])
    reader.read_data(LoadPlan([item]), load_planner(target))
    assert torch.equal(target["w_blocks"], whole[1:2, 1:3, 20:80])

    if storage.name != "torch":  # which fills a part of the tensor, without an error
        target = {"w_blocks": torch.zeros(2, 3, 128)}
        dcp.load(target, storage_reader=storage.QuantizedReader(str(tmp_path)), no_dist=True)
        assert torch.equal(target["w_blocks"], whole)
