"""The cases of test_distributed about programs of torch: patched ones, and FSDP2."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor.placement_types import _StridedShard

import safetensors_torch
from distributed_tensors import distributed, equal, local, saved
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
