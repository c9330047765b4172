"""The cases of test_distributed: each process of a group of four calls them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import safetensors_torch
from ranks import Cases, World
from safetensors_torch import distributed as std

CASES = Cases()

Tensors = dict[str, torch.Tensor]


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """A mesh of four processes, and one of two by two."""
    return DeviceMesh("cpu", torch.arange(4)), DeviceMesh("cpu", torch.arange(4).reshape(2, 2))


def divide(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    """Returns a DTensor of the elements that local_ranges gives this process."""
    coordinate = mesh.get_coordinate()
    local = whole
    for dim, held in enumerate(std.local_ranges(whole.shape, mesh.shape, coordinate, placements)):
        index = torch.tensor([i for begin, end in held for i in range(begin, end)], dtype=torch.int64)
        local = local.index_select(dim, index)
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def wholes(seed: int = 0) -> dict[str, tuple[torch.Tensor, int, list[Any]]]:
    """Whole tensors, the same in all processes; with the number of the mesh and the placements."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    numbers = torch.randint(-100, 100, (7, 3), generator=generator)
    return {
        "rows": (random(8, 6), 0, [Shard(0)]),
        "columns": (random(6, 12, dtype=torch.bfloat16), 0, [Shard(1)]),
        "third": (random(2, 3, 9, dtype=torch.float64), 0, [Shard(2)]),
        "uneven": (random(5, 3), 0, [Shard(0)]),
        "mostly_empty": (random(2, 3), 0, [Shard(0)]),
        "replicated": (random(4, 4), 0, [Replicate()]),
        "hsdp": (random(6, 5), 1, [Replicate(), Shard(0)]),
        "both": (random(6, 8), 1, [Shard(0), Shard(1)]),
        "fsdp_tp": (random(16, 3), 1, [_StridedShard(0, split_factor=2), Shard(0)]),
        "ints": (numbers, 0, [Shard(0)]),
        "bools": (numbers > 0, 0, [Shard(1)]),
        "float8": (random(8, 4).to(torch.float8_e4m3fn), 0, [Shard(0)]),
        "nothing": (random(0, 4), 0, [Shard(0)]),
    }


def distributed(seed: int = 0) -> tuple[Tensors, Tensors]:
    """Whole tensors, and what this process has of them."""
    mesh = meshes()
    whole: Tensors = {}
    mine: Tensors = {}
    for name, (tensor, number, placements) in wholes(seed).items():
        whole[name] = tensor
        mine[name] = divide(tensor, mesh[number], placements)
    whole["scalar"] = mine["scalar"] = torch.tensor(2.5 + seed)
    whole["tied"] = mine["tied"] = whole["scalar"]
    whole["transposed"] = torch.arange(6.0).reshape(2, 3).t() + seed
    mine["transposed"] = whole["transposed"]
    return whole, mine


def lone_strided(whole: torch.Tensor) -> DTensor:
    return divide(whole, meshes()[0], [_StridedShard(0, split_factor=2)])


def saved(tensors: Tensors, path: Path) -> bytes:
    """Returns what save_file writes for whole tensors."""
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors_torch.save_file(contiguous, path, {"format": "pt"})
    return path.read_bytes()


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
    )


def strays(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


@contextlib.contextmanager
def failing(*kinds: type[BaseException], text: str = "") -> Iterator[None]:
    """Expects an error of one of these kinds with this text."""
    try:
        yield
    except kinds as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no error: {text}")


@CASES
def the_file_is_that_of_the_whole_tensors(world: World) -> None:
    whole, mine = distributed()
    whole["lone"] = torch.arange(24.0).reshape(12, 2)
    mine["lone"] = lone_strided(whole["lone"])
    names = std.save(mine, world.directory / "new" / "directory")
    assert names == ["model.safetensors"]
    found = (world.directory / "new" / "directory" / names[0]).read_bytes()
    assert found == saved(whole, world.directory / f"expected-{world.rank}")
    assert strays(world.directory / "new" / "directory") == []


@CASES
def several_files_are_those_of_save_sharded(world: World) -> None:
    whole, mine = distributed()
    names = std.save(mine, world.directory, {"key": "value"}, max_shard_size=200, durable=True)
    expected = world.directory / f"expected-{world.rank}"
    contiguous = {name: tensor.contiguous().clone() for name, tensor in whole.items()}
    assert names == safetensors_torch.save_sharded(contiguous, expected, {"key": "value"}, max_shard_size=200)
    assert len(names) > 5
    for name in names:
        assert (world.directory / name).read_bytes() == (expected / name).read_bytes(), name


@CASES
def tensors_of_some_processes_alone_are_saved(world: World) -> None:
    mine = {f"stage.{world.rank}": torch.full((3,), world.rank), "everywhere": torch.zeros(2)}
    std.save(mine, world.directory, dtype=torch.bfloat16)
    loaded = safetensors_torch.load_file(world.directory / "model.safetensors")
    assert sorted(loaded) == ["everywhere", *(f"stage.{rank}" for rank in range(4))]
    assert loaded["everywhere"].dtype == torch.bfloat16 and loaded["stage.3"].tolist() == [3, 3, 3]


@CASES
def a_group_of_two_saves(world: World) -> None:
    if world.rank > 1:
        with failing(ValueError, text="not in process_group"):
            std.save({}, world.directory, process_group=world.pair)
        return
    mesh = DeviceMesh("cpu", torch.arange(2), _init_backend=False)
    whole = torch.arange(10.0).reshape(5, 2)
    mine = divide(whole, mesh, [Shard(0)])
    std.save({"w": mine}, world.directory, process_group=world.pair)
    assert equal(safetensors_torch.load_file(world.directory / "model.safetensors")["w"], whole)


@CASES
def a_checkpoint_is_replaced_and_stays_if_a_process_fails(world: World) -> None:
    whole, mine = distributed()
    std.save(mine, world.directory, max_shard_size=300)
    before = {name: (world.directory / name).read_bytes() for name in os.listdir(world.directory)}
    other = distributed(seed=1)[1]

    def interrupt(done: int, total: int) -> None:
        if world.rank == 2:
            raise ConnectionError("no more")

    for arguments, kind, text in (
        ({"progress": interrupt}, ConnectionError, "no more"),
        ({"metadata": {"a": 1} if world.rank == 2 else None}, TypeError, "the metadata value of 'a'"),
    ):
        with failing(kind if world.rank == 2 else RuntimeError, text=text):
            std.save(other, world.directory, **arguments)
    broken = {**other, "rows": torch.zeros(3)} if world.rank == 2 else other
    with failing(*((ValueError,) if world.rank == 0 else (RuntimeError,)), text="tensor 'rows': rank 2 has"):
        std.save(broken, world.directory)
    with failing(TypeError if world.rank == 2 else RuntimeError, text="'step' is int"):
        std.save({**other, "step": 3} if world.rank == 2 else other, world.directory)
    part = divide(torch.zeros(3), meshes()[0], [Shard(0)])
    gap = {"w": torch.zeros(3) if world.rank else part}
    with failing(*((ValueError,) if world.rank == 0 else (RuntimeError,)), text="chunks of it overlap"):
        std.save(gap, world.directory)
    with failing(*((OSError,) if world.rank == 2 else (RuntimeError,)), text="all processes share"):
        std.save(other, world.directory / "elsewhere" if world.rank == 2 else world.directory)
    dist.barrier()
    assert {name: (world.directory / name).read_bytes() for name in os.listdir(world.directory)} == before
    std.save(other, world.directory)
    assert os.listdir(world.directory) == ["model.safetensors"]


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
    assert all(torch.equal(_local(target[name]), _local(before[name])) for name in target if name != "float8")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
def weights_are_read_once_for_all(world: World) -> None:
    whole = {name: tensor for name, (tensor, _, _) in wholes().items()}
    whole["large"] = torch.arange(600_000, dtype=torch.float32)
    whole["larger"] = torch.arange(5_000_000, dtype=torch.float32)
    whole["scalar"] = torch.tensor(True)
    if world.rank == 0:
        safetensors_torch.save_sharded(whole, world.directory, max_shard_size=21_000_000)
    dist.barrier()
    files = sorted(world.directory.glob("*.safetensors"))
    assert len(files) == 2
    orders = {}
    for read_once in ("world", "node"):
        order = []
        for name, tensor in std.weights_iterator(files, "cpu", dist.group.WORLD, read_once=read_once, buffer_bytes=1):
            assert equal(tensor, whole[name]), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes or tensor.nbytes == 0
            order.append(name)
        assert sorted(order) == sorted(whole)
        orders[read_once] = order
    assert world.share(orders) == [orders] * 4
    for options in ({"process_group": dist.group.WORLD}, {}):
        alone = dict(std.weights_iterator(world.directory, **options))
        assert all(equal(alone[name], tensor) for name, tensor in whole.items())
    slices = {"rows": slice(2, 5), "larger": (slice(10, 20),), "columns": (0,)}
    for group in (dist.group.WORLD, None):
        options = {"names": ["larger", "rows", "columns"], "slices": slices, "read_once": "world" if group else False}
        found = dict(std.weights_iterator(files, "cpu", group, **options))
        assert sorted(found) == ["columns", "larger", "rows"]
        assert equal(found["rows"], whole["rows"][2:5]) and equal(found["larger"], whole["larger"][10:20])
        assert equal(found["columns"], whole["columns"][0])


@CASES
def a_weight_that_one_process_cannot_read_is_an_error_in_all(world: World) -> None:
    if world.rank == 0:
        tensors = {f"t{number}": torch.full((6_000_000,), float(number)) for number in range(4)}
        safetensors_torch.save_file(tensors, world.directory / "model.safetensors")
    dist.barrier()
    path = world.directory / "model.safetensors"
    with failing(*((OSError,) if world.rank == 3 else (RuntimeError,)), text="nowhere"):
        next(std.weights_iterator("nowhere" if world.rank == 3 else path, "cpu", dist.group.WORLD, read_once="world"))
    tensors = std.weights_iterator(path, "cpu", dist.group.WORLD, read_once="world", buffer_bytes=1)
    assert next(tensors)[0] == "t0"
    dist.barrier()
    if world.rank == 0:
        with open(path, "r+b") as file:
            file.truncate(50_000_000)
    dist.barrier()
    # Rank 2 reads the third tensor, which is not there any more.
    kind = safetensors_torch.SafetensorError if world.rank == 2 else RuntimeError
    with failing(kind, text="" if world.rank == 2 else "rank 2 could not read its part"):
        list(tensors)


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
    assert all(equal(_local(target[name]), _local(mine[name])) for name in mine if name != "transposed")
    assert "model-00002-of-00002.safetensors" in os.listdir(world.directory)


@CASES
def replicated_elements_are_read_once(world: World) -> None:
    whole, mine = distributed()
    std.save(mine, world.directory, max_shard_size=300)
    for read_once in ("world", "node", False):
        target = distributed(seed=1)[1]
        target["transposed"] = torch.zeros(2, 3).t()
        assert std.load_into(target, world.directory, read_once=read_once) == ([], [])
        assert all(equal(_local(target[name]), _local(mine[name])) for name in mine), read_once
        target = {name: torch.zeros_like(tensor) for name, tensor in distributed()[1].items()}
        reader = std.HuggingFaceStorageReader(world.directory, process_group=dist.group.WORLD, read_once=read_once)
        dcp.load(target, storage_reader=reader)
        assert all(equal(_local(target[name]), _local(mine[name])) for name in mine), read_once
    # What one process does not need, the others cannot get from it.
    some = {"scalar": torch.zeros(())} if world.rank == 1 else {"replicated": torch.zeros(4, 4)}
    with failing(*((ValueError,) if world.rank == 0 else (RuntimeError,)), text="needs other elements"):
        std.load_into(some, world.directory, strict=False, read_once="world")
    assert std.load_into(some, world.directory, strict=False, read_once=False)[0] == []


@CASES
def a_full_disk_is_an_error_before_the_first_byte(world: World) -> None:
    std.save({"w": torch.zeros(10)}, world.directory / "small")
    is_mounted = False
    if world.rank == 0 and os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(world.directory / "small")]
        is_mounted = subprocess.run(command, check=False).returncode == 0
    if not world.share(is_mounted)[0]:
        return  # only root can mount
    try:
        large = divide(torch.zeros(400, 100), meshes()[0], [Shard(0)])
        with failing(OSError if world.rank == 0 else RuntimeError, text="No space left"):
            std.save({"w": large}, world.directory / "small")
        with failing(CheckpointException, text="No space left"):
            dcp.save({"w": large}, storage_writer=std.HuggingFaceStorageWriter(world.directory / "small"))
        dist.barrier()
        assert os.listdir(world.directory / "small") == []
    finally:
        dist.barrier()
        if world.rank == 0:
            subprocess.run(["umount", str(world.directory / "small")], check=True)
    dist.barrier()
    assert os.listdir(world.directory / "small") == ["model.safetensors"]


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
        before = {name: _local(tensor).clone() for name, tensor in model.state_dict().items()}
        for load in (
            lambda path: std.load_into(model, path, read_once="world"),
            lambda path: dcp.load(model.state_dict(), storage_reader=std.HuggingFaceStorageReader(path)),
        ):
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
            load(world.directory / layout)
            assert all(torch.equal(_local(tensor), before[name]) for name, tensor in model.state_dict().items())
