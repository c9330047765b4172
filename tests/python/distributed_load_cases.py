"""The cases of test_distributed about load_into, load_dtensors and our reader."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import safetensors_torch
from distributed_tensors import distributed, divide, equal, failing, local, meshes
from ranks import Cases, World
from safetensors_torch import distributed as std

CASES = Cases()


@CASES
def every_process_count_loads_every_other(world: World) -> None:
    whole, mine = distributed()
    std.save(mine, world.directory, max_shard_size=300)
    target = distributed(seed=1)[1]
    target["transposed"] = torch.zeros(2, 3).t()
    assert std.load_into(target, world.directory) == ([], [])
    for name, tensor in mine.items():
        left, right = (value.to_local() if isinstance(value, DTensor) else value for value in (target[name], tensor))
        assert equal(left, right), name
    if world.rank < 2:
        mesh = DeviceMesh("cpu", torch.arange(2), _init_backend=False)
        halves = {name: divide(torch.zeros_like(t), mesh, [Shard(0)]) for name, t in whole.items() if t.dim()}
        missing, unexpected = std.load_into(halves, world.directory, strict=False, process_group=world.pair)
        assert (missing, unexpected) == ([], ["scalar", "tied"])
        for name, half in halves.items():
            assert equal(half.to_local(), divide(whole[name], mesh, [Shard(0)]).to_local()), name
    loaded = std.load_dtensors(world.directory, meshes()[0], [Shard(0)], dtype=torch.float16)
    assert list(loaded) and loaded["rows"].dtype == torch.float16 and loaded["ints"].dtype == torch.int64
    for name, tensor in loaded.items():
        if tensor.dim() and not tensor.dtype.is_floating_point:
            assert equal(tensor.to_local(), divide(whole[name], meshes()[0], [Shard(0)]).to_local()), name
    assert loaded["scalar"].placements == (Replicate(),)


@CASES
def dcp_loads_whole_and_divided_tensors(world: World) -> None:
    whole, mine = distributed()
    std.save(mine, world.directory, max_shard_size=300)
    # Final files count, not those of processes beside them.
    dcp.save({"rows": torch.zeros(2)}, storage_writer=std.HuggingFaceStorageWriter(world.directory, layout="shards"))
    dist.barrier()
    target = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(target, storage_reader=std.HuggingFaceStorageReader(world.directory))
    assert all(equal(target[name], whole[name]) for name in whole)
    target = distributed(seed=1)[1]
    dcp.load(target, storage_reader=std.HuggingFaceStorageReader(world.directory))
    assert equal(target["hsdp"].to_local(), mine["hsdp"].to_local())


@CASES
def a_load_that_fails_changes_nothing(world: World) -> None:
    whole, mine = distributed()
    std.save(mine, world.directory)
    target = distributed(seed=1)[1]
    before = {name: value.clone() for name, value in target.items()}
    wrong = {**target, "rows": torch.zeros(3)} if world.rank == 3 else target
    with failing(ValueError if world.rank == 3 else RuntimeError, text="tensor 'rows' has shape [8, 6]"):
        std.load_into(wrong, world.directory)
    more = {**target, "more": torch.zeros(1)} if world.rank == 3 else target
    with failing(RuntimeError, text="missing in the checkpoint: 'more'"):
        std.load_into(more, world.directory)
    with failing(*((OSError,) if world.rank == 3 else (RuntimeError,)), text="nowhere"):
        std.load_into(target, world.directory / "nowhere" if world.rank == 3 else world.directory)
    assert all(torch.equal(local(target[name]), local(before[name])) for name in target if name != "float8")


@CASES
def files_of_a_process_that_are_missing_or_cut_are_named(world: World) -> None:
    mine = distributed()[1]
    dcp.save(mine, storage_writer=std.HuggingFaceStorageWriter(world.directory, save_distributed=True))
    dist.barrier()
    name = "shard-00002-model-00001-of-00001.safetensors"
    content = (world.directory / name).read_bytes()
    dist.barrier()
    target = distributed(seed=1)[1]
    for change, text in ((None, "a file is missing"), (content[:-8], name)):
        if world.rank == 0:
            (world.directory / name).unlink(missing_ok=True)
            if change is not None:
                (world.directory / name).write_bytes(change)
        dist.barrier()
        with failing(safetensors_torch.SafetensorError, text=text):
            std.load_into(target, world.directory)
        with failing(CheckpointException, text=text):
            dcp.load(target, storage_reader=std.HuggingFaceStorageReader(world.directory))


@CASES
def replicated_elements_are_read_once(world: World) -> None:
    whole, mine = distributed()
    std.save(mine, world.directory, max_shard_size=300)
    for read_once in ("world", "node", False):
        target = distributed(seed=1)[1]
        target["transposed"] = torch.zeros(2, 3).t()
        assert std.load_into(target, world.directory, read_once=read_once) == ([], [])
        assert all(equal(local(target[name]), local(mine[name])) for name in mine), read_once
        target = {name: torch.zeros_like(tensor) for name, tensor in distributed()[1].items()}
        reader = std.HuggingFaceStorageReader(world.directory, process_group=dist.group.WORLD, read_once=read_once)
        dcp.load(target, storage_reader=reader)
        assert all(equal(local(target[name]), local(mine[name])) for name in mine), read_once
    # What one process does not need, the others cannot get from it.
    some = {"scalar": torch.zeros(())} if world.rank == 1 else {"replicated": torch.zeros(4, 4)}
    with failing(*((ValueError,) if world.rank == 0 else (RuntimeError,)), text="needs other elements"):
        std.load_into(some, world.directory, strict=False, read_once="world")
    assert std.load_into(some, world.directory, strict=False, read_once=False)[0] == []


@CASES
def an_index_that_lies_is_refused_by_all(world: World) -> None:
    mine = distributed()[1]
    names = std.save(mine, world.directory, max_shard_size=300)
    dist.barrier()
    if world.rank == 0:
        path = world.directory / names[-1]
        index = json.loads(path.read_text())
        index["weight_map"]["rows"], index["weight_map"]["columns"] = names[0], names[1]
        index["weight_map"]["absent"] = names[0]
        path.write_text(json.dumps(index))
    dist.barrier()
    with failing(safetensors_torch.SafetensorError, text=names[0]):
        std.load_into(mine, world.directory)
    with failing(CheckpointException, text=names[0]):
        dcp.load(mine, storage_reader=std.HuggingFaceStorageReader(world.directory))


@CASES
def a_process_that_needs_nothing_is_noticed(world: World) -> None:
    std.save({"a": torch.ones(4), "b": torch.ones(2)}, world.directory)
    target = {"a": torch.zeros(4), "b": torch.zeros(2)} if world.rank != 2 else {}
    with failing(*((ValueError,) if world.rank == 0 else (RuntimeError,)), text="rank 2 needs other elements"):
        std.load_into(target, world.directory, strict=False, read_once="world")
    # A mesh that is larger than the group: its members read by themselves.
    if world.rank < 2:
        loaded = std.load_dtensors(
            world.directory,
            DeviceMesh("cpu", torch.arange(4), _init_backend=False),
            [Shard(0)],
            read_once="world",
            process_group=world.pair,
        )
        assert loaded["a"].to_local().tolist() == [1]


@CASES
def an_error_of_one_process_before_the_reads_reaches_all(world: World) -> None:
    class Failing(dcp.DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> Any:
            if world.rank == 1:
                raise ConnectionError("mine")
            return super().resolve_tensor(read_item)

    class Broken(torch.nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            if world.rank == 1:
                raise ConnectionError("mine")
            return super().state_dict(*args, **kwargs)

    std.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, world.directory)
    reader = std.HuggingFaceStorageReader(world.directory, process_group=dist.group.WORLD, read_once="world")
    with failing(CheckpointException, text="mine"):
        dcp.load({"bias": torch.zeros(2)}, storage_reader=reader, planner=Failing())
    with failing(ConnectionError if world.rank == 1 else RuntimeError, text="mine"):
        std.load_into(Broken(2, 2), world.directory)
    device = "nonsense" if world.rank == 1 else "cpu"
    with failing(RuntimeError, text="nonsense"):
        std.weights_iterator(world.directory, device, dist.group.WORLD, read_once="world")
