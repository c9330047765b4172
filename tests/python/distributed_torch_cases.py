"""The cases of test_distributed about what torch has itself: its own storage classes, placements, and FSDP2."""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import safetensors_torch
from distributed_tensors import distributed, divide, equal, local, meshes, saved
from ranks import Cases, World
from safetensors_torch import distributed as std

CASES = Cases()


@CASES
def patched_torch_uses_ours(world: World) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank

    module = globals()
    module["consolidate_by_any_name"] = consolidate_safetensors_files_on_every_rank
    whole, mine = distributed()
    with safetensors_torch.patch_safetensors(dcp=True):
        assert issubclass(dcp.HuggingFaceStorageWriter, std.HuggingFaceStorageWriter)
        writer = dcp.HuggingFaceStorageWriter(path=str(world.directory / "sharded"), save_distributed=True)
        dcp.save(mine, storage_writer=writer)
        dist.barrier()
        mapping = {name: 1 + number % 2 for number, name in enumerate(sorted(whole))}
        module["consolidate_by_any_name"](
            str(world.directory / "sharded"), str(world.directory), mapping, num_threads=5
        )
        target = distributed(seed=1)[1]
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(world.directory)))
    assert module["consolidate_by_any_name"] is consolidate_safetensors_files_on_every_rank
    loaded = safetensors_torch.load_sharded(world.directory)
    assert all(equal(loaded[name], whole[name]) for name in whole)
    assert all(equal(local(target[name]), local(mine[name])) for name in mine if name != "transposed")
    assert "model-00002-of-00002.safetensors" in os.listdir(world.directory)


@CASES
def fsdp2_with_tensor_parallelism(world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(17, 30), torch.nn.Linear(30, 7))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))
    parallelize_module(model, mesh["parts"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["replicas"])
    held = model.state_dict()["0.weight"].placements
    assert any(isinstance(placement, _StridedShard) for placement in held), held

    std.save(model.state_dict(), world.directory)
    found = (world.directory / "model.safetensors").read_bytes()
    assert found == saved(whole, world.directory / f"expected-{world.rank}")
    for layout in ("final", "shards"):
        writer = std.HuggingFaceStorageWriter(world.directory / layout, save_distributed=True, layout=layout)
        dcp.save(model.state_dict(), storage_writer=writer)
        before = {name: local(tensor).clone() for name, tensor in model.state_dict().items()}
        for load in (
            lambda path: std.load_into(model, path, read_once="world"),
            lambda path: dcp.load(model.state_dict(), storage_reader=std.HuggingFaceStorageReader(path)),
        ):
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
            load(world.directory / layout)
            assert all(torch.equal(local(tensor), before[name]) for name, tensor in model.state_dict().items())


def divisions() -> list[tuple[DeviceMesh, list[Any]]]:
    """All placements of a matrix on both meshes."""
    line, square = meshes()
    placements = (Replicate(), Shard(0), Shard(1))
    pairs = itertools.product(placements, repeat=2)
    return [*((line, [placement]) for placement in placements), *((square, [*pair]) for pair in pairs)]


def split(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    """Divides a tensor as torch does, without communication."""
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


@CASES
def every_placement_loads_every_other(world: World) -> None:
    # With one element, most processes have none.
    pairs = list(itertools.product(divisions(), divisions(), [(4, 4), (1, 1)]))
    generator = torch.Generator().manual_seed(0)
    for layout in ("shards", "final"):
        whole = {str(number): torch.rand(shape, generator=generator) for number, (_, _, shape) in enumerate(pairs)}
        sources, targets = (
            {name: split(tensor, *pair[end]) for (name, tensor), pair in zip(whole.items(), pairs, strict=True)}
            for end in (0, 1)
        )
        path = world.directory / layout
        dcp.save(sources, storage_writer=std.HuggingFaceStorageWriter(path, save_distributed=True, layout=layout))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in targets.items()}
        dcp.load(zeros, storage_reader=std.HuggingFaceStorageReader(path))
        for name, tensor in targets.items():
            assert equal(zeros[name].to_local(), tensor.to_local()), (layout, pairs[int(name)])


@CASES
def a_save_of_shards_removes_those_of_processes_that_write_nothing_now(world: World) -> None:
    mesh = meshes()[0]
    for value, placement, count in ((1.0, Shard(0), 4), (2.0, Replicate(), 1), (3.0, Shard(1), 4)):
        whole = torch.full((4, 4), value)
        writer = std.HuggingFaceStorageWriter(world.directory, save_distributed=True)
        dcp.save({"w": split(whole, mesh, [placement])}, storage_writer=writer)
        dist.barrier()
        assert len(os.listdir(world.directory)) == count
        target = {"w": torch.zeros(4, 4)}
        dcp.load(target, storage_reader=std.HuggingFaceStorageReader(world.directory))
        assert equal(target["w"], whole)
        dist.barrier()


@CASES
def one_process_saves_and_loads_alone(world: World) -> None:
    whole, mine = distributed()
    files = dict.fromkeys(whole, 1) | {"rows": 2}
    if world.rank == 1:
        writer = std.HuggingFaceStorageWriter(world.directory, files)
        dcp.save(whole, storage_writer=writer, no_dist=True)
        target = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
        dcp.load(target, storage_reader=std.HuggingFaceStorageReader(world.directory), no_dist=True)
        assert all(equal(target[name], whole[name]) for name in whole)
    dist.barrier()
    assert sorted(os.listdir(world.directory))[:2] == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    target = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
    dcp.load(target, storage_reader=std.HuggingFaceStorageReader(world.directory))
    assert all(equal(local(target[name]), local(mine[name])) for name in mine)


@CASES
def processes_return_from_a_consolidation_when_all_files_are_there(world: World) -> None:
    from torch.distributed.checkpoint import _consolidate_hf_safetensors as module

    whole = {"large": torch.arange(4e6).reshape(2000, 2000), "small": torch.arange(16.0).reshape(4, 4)}
    mine = {name: divide(tensor, meshes()[0], [Shard(number)]) for number, (name, tensor) in enumerate(whole.items())}
    shards = world.directory / "shards"
    dcp.save(mine, storage_writer=std.HuggingFaceStorageWriter(shards, save_distributed=True))
    for group, mapping in (
        (None, {"large": 1, "small": 1}),
        (None, {"large": 1, "small": 2}),
        (world.pair, {"large": 2, "small": 1}),
    ):
        count = max(mapping.values())
        output = world.directory / f"{count}-{mapping['large']}"
        if group is not None and world.rank > 1:
            continue
        with safetensors_torch.patch_safetensors(dcp=True):
            module.consolidate_safetensors_files_on_every_rank(str(shards), str(output), mapping, process_group=group)
        # Without a barrier.
        names = {name: f"model-0000{number}-of-0000{count}.safetensors" for name, number in mapping.items()}
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == names
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
        loaded = {name: safetensors_torch.load_file(output / names[name])[name] for name in whole}
        assert all(equal(loaded[name], whole[name]) for name in whole)


@CASES
def quantized_weights_are_divided_within_their_blocks(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scales = torch.rand(10, 7, generator=generator), torch.rand(4, 3, generator=generator)
    if world.rank == 0:
        tensors = {"w.weight": weight, "w.weight_scale_inv": scales, "bias": weight[0].clone()}
        safetensors_torch.save_sharded(tensors, world.directory, max_shard_size=100)
    dist.barrier()
    factors = scales.repeat_interleave(3, 0)[:10].repeat_interleave(3, 1)[:, :7]
    whole = {"w.weight": weight * factors, "bias": weight[0]}
    for mesh, placements in divisions():
        for options in ({}, {"process_group": dist.group.WORLD, "read_once": "world"}):
            one = [Replicate()] * mesh.ndim
            expected = {"w.weight": split(whole["w.weight"], mesh, placements), "bias": split(whole["bias"], mesh, one)}
            target = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
            reader = std.QuantizedHuggingFaceStorageReader(world.directory, block_size=3, **options)
            dcp.load(target, storage_reader=reader)
            for name, tensor in expected.items():
                assert equal(target[name].to_local(), tensor.to_local()), (name, placements, options)
