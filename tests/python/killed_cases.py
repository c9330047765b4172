"""The case of test_distributed in which a process is killed: the group is lost after it."""

from __future__ import annotations

import os
import signal

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import safetensors_torch
from ranks import Cases, World
from safetensors_torch import distributed as std

CASES = Cases()


@CASES
def a_killed_process_is_an_error_in_the_others(world: World) -> None:
    mesh = DeviceMesh("cpu", torch.arange(world.size))

    def tensors(value: float) -> dict[str, torch.Tensor]:
        local = torch.full((1000, 1000), value)
        return {"w": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}

    std.save(tensors(1), world.directory)

    def kill(done: int, total: int) -> None:
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        std.save(tensors(2), world.directory, progress=kill)
    except RuntimeError:
        pass
    else:
        raise AssertionError("no error")
    if world.rank == 0:  # it has created the hidden file
        assert os.listdir(world.directory) == ["model.safetensors"]
    loaded = safetensors_torch.load_file(world.directory / "model.safetensors")["w"]
    assert loaded.shape == (1000 * world.size, 1000) and bool((loaded == 1).all())
    (world.directory.parent / f"passed-{world.rank}").touch()
