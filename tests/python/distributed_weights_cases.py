"""The cases of test_distributed about weights_iterator."""

from __future__ import annotations

import torch
import torch.distributed as dist

import safetensors_torch
from distributed_tensors import equal, failing, wholes
from ranks import Cases, World
from safetensors_torch import distributed as std

CASES = Cases()


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
