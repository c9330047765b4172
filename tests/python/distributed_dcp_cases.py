"""The cases of test_distributed about saves of torch.distributed.checkpoint with our writer."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import safetensors_torch
from distributed_tensors import Tensors, distributed, divide, equal, failing, lone_strided, saved, strays
from ranks import Cases, World
from safetensors_torch import distributed as std

CASES = Cases()


@CASES
def dcp_saves_the_final_file(world: World) -> None:
    whole, mine = distributed()
    expected = saved(whole, world.directory / f"expected-{world.rank}")
    for number, options in enumerate(
        (
            {"save_distributed": True, "enable_consolidation": True},
            {"layout": "final", "save_distributed": True, "durable": True},
            {},
        )
    ):
        path = world.directory / str(number)
        dcp.save(mine, storage_writer=std.HuggingFaceStorageWriter(path, **options))
        assert sorted(os.listdir(path)) == ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
        assert (path / "model-00001-of-00001.safetensors").read_bytes() == expected


@CASES
def dcp_saves_files_by_a_mapping_and_by_size(world: World) -> None:
    whole, mine = distributed()
    mapping = {name: 1 + number % 3 for number, name in enumerate(whole)}
    writer = std.HuggingFaceStorageWriter(
        world.directory, mapping, save_distributed=True, enable_consolidation=True, metadata={"a": "b"}
    )
    dcp.save(mine, storage_writer=writer)
    for number in (1, 2, 3):
        path = world.directory / f"model-{number:05d}-of-00003.safetensors"
        loaded = safetensors_torch.load_file(path)
        assert sorted(loaded) == sorted(name for name in whole if mapping[name] == number)
        assert all(equal(tensor, whole[name]) for name, tensor in loaded.items())
    assert safetensors_torch.inspect(path).metadata == {"format": "pt", "a": "b"}
    half = std.HuggingFaceStorageWriter(
        world.directory / "half", save_distributed=True, layout="final", dtype="float16"
    )
    dcp.save(mine, storage_writer=half)
    loaded = safetensors_torch.load_sharded(world.directory / "half")
    assert all(equal(loaded[name], whole[name].half()) for name in ("rows", "columns", "fsdp_tp", "transposed"))
    assert equal(loaded["ints"], whole["ints"])
    by_size = std.HuggingFaceStorageWriter(world.directory / "size", layout="final", max_shard_size=300)
    dcp.save(mine, storage_writer=by_size)
    loaded = safetensors_torch.load_sharded(world.directory / "size")
    assert len(os.listdir(world.directory / "size")) > 3
    assert all(equal(loaded[name], whole[name]) for name in whole)


@CASES
def dcp_saves_strided_shards_with_our_planner_alone(world: World) -> None:
    whole = torch.arange(24.0).reshape(12, 2)
    mine = {"lone": lone_strided(whole)}
    options = {"save_distributed": True, "enable_consolidation": True}
    # torch's planner finds overlapping chunks itself, and logs the name.
    with failing(CheckpointException):
        dcp.save(mine, storage_writer=std.HuggingFaceStorageWriter(world.directory / "no", **options))
    dist.barrier()
    assert not (world.directory / "no").exists() or os.listdir(world.directory / "no") == []
    for layout in ("final", "shards"):
        path = world.directory / layout
        writer = std.HuggingFaceStorageWriter(path, save_distributed=True, layout=layout)
        dcp.save(mine, storage_writer=writer, planner=std.SavePlanner())
        target = {"lone": lone_strided(torch.zeros_like(whole))}
        with failing(CheckpointException, text="LoadPlanner"):
            dcp.load(target, storage_reader=std.HuggingFaceStorageReader(path))
        dcp.load(target, storage_reader=std.HuggingFaceStorageReader(path), planner=std.LoadPlanner())
        assert equal(target["lone"].to_local(), mine["lone"].to_local())
        again = {"lone": lone_strided(torch.zeros_like(whole))}
        assert std.load_into(again, path) == ([], [])
        assert equal(again["lone"].to_local(), mine["lone"].to_local())


@CASES
def dcp_refuses_values_that_are_no_tensors(world: World) -> None:
    for layout in ("final", "shards"):
        writer = std.HuggingFaceStorageWriter(world.directory / layout, save_distributed=True, layout=layout)
        with failing(CheckpointException, text="'step' is not a tensor"):
            dcp.save({"w": torch.zeros(2), "step": 3}, storage_writer=writer)


@CASES
def dcp_saves_again_with_cached_plans(world: World) -> None:
    def planner() -> DefaultSavePlanner:
        return DefaultSavePlanner(enable_plan_caching=True)

    writer = std.HuggingFaceStorageWriter(world.directory / "0", save_distributed=True, enable_consolidation=True)
    for number in range(4):
        path = world.directory / str(number)
        whole, mine = distributed(seed=number)
        if number == 2:  # later ones write with another writer, and one process has another plan
            writer = std.HuggingFaceStorageWriter(path, save_distributed=True, enable_consolidation=True)
        if number == 3:
            whole["extra"] = torch.arange(3)
            mine |= {"extra": whole["extra"]} if world.rank == 1 else {}
        dcp.save(mine, checkpoint_id=path, storage_writer=writer, planner=planner())
        loaded = safetensors_torch.load_sharded(path)
        assert sorted(loaded) == sorted(whole)
        assert all(equal(loaded[name], whole[name]) for name in whole), number
        assert strays(path) == []


@CASES
def dcp_saves_in_the_background(world: World) -> None:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    whole, mine = distributed()
    for kind in (AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS):
        path = world.directory / kind.value
        writer = std.HuggingFaceStorageWriter(path, save_distributed=True, enable_consolidation=True)
        saving = dcp.async_save(mine, storage_writer=writer, async_checkpointer_type=kind)
        saving.result()
        dist.barrier()
        loaded = safetensors_torch.load_sharded(path)
        assert all(equal(loaded[name], whole[name]) for name in whole), kind


@CASES
def shards_are_those_of_torch(world: World) -> None:
    names = ("rows", "columns", "uneven", "hsdp", "both", "fsdp_tp", "replicated")
    whole, mine = ({name: tensors[name] for name in names} for tensors in distributed())
    for writer_type, reader_type in (
        (std.HuggingFaceStorageWriter, dcp.HuggingFaceStorageReader),
        (dcp.HuggingFaceStorageWriter, std.HuggingFaceStorageReader),
        (std.HuggingFaceStorageWriter, std.HuggingFaceStorageReader),
    ):
        path = world.directory / f"{writer_type.__module__}-{reader_type.__module__}"
        dcp.save(mine, storage_writer=writer_type(str(path), save_distributed=True))
        dist.barrier()
        mesh = DeviceMesh("cpu", torch.arange(4))
        target = {name: divide(torch.zeros_like(tensor), mesh, [Shard(0)]) for name, tensor in whole.items()}
        dcp.load(target, storage_reader=reader_type(str(path)))
        for name, tensor in whole.items():
            assert equal(target[name].to_local(), divide(tensor, mesh, [Shard(0)]).to_local()), (path, name)
        if world.rank == 0:
            std.consolidate(path, path / "whole")
            assert (path / "whole" / "model.safetensors").read_bytes() == saved(whole, path / "expected")
        assert any(name.startswith("shard-00004-model-00001-of-00001") for name in os.listdir(path))


@CASES
def a_save_of_shards_that_fails_leaves_the_old_ones(world: World) -> None:
    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if world.rank == 1:
                raise ConnectionError("no more")
            return super().resolve_data(write_item)

    whole, mine = distributed()
    names = ("rows", "columns", "uneven")

    def save(tensors: Tensors, planner: Any = None) -> None:
        writer = std.HuggingFaceStorageWriter(world.directory, save_distributed=True)
        dcp.save({name: tensors[name] for name in names}, storage_writer=writer, planner=planner)

    save(mine)
    with failing(CheckpointException, text="no more"):
        save(distributed(seed=1)[1], Failing())
    dist.barrier()
    target = {name: torch.zeros_like(whole[name]) for name in names}
    std.load_into(target, world.directory)
    assert all(equal(target[name], whole[name]) for name in names)
    whole, mine = distributed(seed=2)
    save(mine)
    dist.barrier()
    assert strays(world.directory) == []
    std.load_into(target, world.directory)
    assert all(equal(target[name], whole[name]) for name in names)
    # The last file is missing: the others are a box, but not the whole tensor.
    dist.barrier()
    if world.rank == 0:
        (world.directory / "shard-00004-model-00001-of-00001.safetensors").unlink()
    dist.barrier()
    with failing(safetensors_torch.SafetensorError, text="a file is missing"):
        std.load_into(target, world.directory)
    with failing(safetensors_torch.SafetensorError, text="a file of the checkpoint is missing"):
        std.consolidate(world.directory, world.directory / f"whole-{world.rank}")


@CASES
def cached_plans_of_other_saves_are_not_mixed_up(world: World) -> None:
    class Cached(DefaultSavePlanner):
        def __init__(self) -> None:
            super().__init__(enable_plan_caching=True)

    def save(tensors: Tensors, name: str, planner: Any, **options: Any) -> dict[str, torch.Tensor]:
        writer = std.HuggingFaceStorageWriter(world.directory / name, save_distributed=True, **options)
        dcp.save(tensors, storage_writer=writer, planner=planner)
        dist.barrier()
        return safetensors_torch.load_sharded(world.directory / name) if options else {}

    final = {"enable_consolidation": True}
    first = {"a": torch.arange(3), "b": torch.arange(5) + world.rank * 0}
    other = {f"t{number}": torch.full((3,), number) for number in range(5)}
    assert sorted(save(first, "first", Cached(), **final)) == ["a", "b"]
    assert sorted(save(other, "other", DefaultSavePlanner(), **final)) == sorted(other)
    assert sorted(save(first, "first", Cached(), **final)) == ["a", "b"]
    save(other, "shards", Cached())
    with failing(CheckpointException, text="the planner has cached the plan"):
        save(other, "first", Cached(), **final)
    assert sorted(safetensors_torch.load_sharded(world.directory / "first")) == ["a", "b"]


@CASES
def a_process_that_fails_removes_the_hidden_files(world: World) -> None:
    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if world.rank == 2:
                raise ConnectionError("no more")
            return super().resolve_data(write_item)

    mine = distributed()[1]
    writers = []
    for planner, text in ((Failing(), "no more"), (DefaultSavePlanner(), "")):
        # As long as a program keeps the writer of the first process, that keeps its files.
        writers.append(std.HuggingFaceStorageWriter(world.directory, layout="final", save_distributed=True))
        with failing(CheckpointException, text=text) if text else contextlib.nullcontext():
            dcp.save(mine, storage_writer=writers[-1], planner=planner)
        dist.barrier()
        assert strays(world.directory) == []


@CASES
def a_writer_of_other_processes_is_refused(world: World) -> None:
    writer = std.HuggingFaceStorageWriter(world.directory, layout="final", process_group=world.pair)
    tensors = {"w": torch.zeros(2)}
    with failing(CheckpointException, text="4 processes save, but process_group has 2"):
        dcp.save(tensors, storage_writer=writer)
    if world.rank < 2:
        dcp.save(tensors, storage_writer=writer, process_group=world.pair)
        assert safetensors_torch.load_sharded(world.directory)["w"].tolist() == [0, 0]
