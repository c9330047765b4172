"""The cases of test_distributed about save."""

from __future__ import annotations

import os
import subprocess

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import safetensors_torch
from distributed_tensors import distributed, divide, equal, failing, lone_strided, meshes, saved, strays
from ranks import Cases, World
from safetensors_torch import distributed as std

CASES = Cases()


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
