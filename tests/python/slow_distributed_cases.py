"""The cases of test_slow_files in two processes: the directory has a link `mounted` to a slow filesystem."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ranks import Cases, World
from safetensors_torch import distributed as std

CASES = Cases()

TENSORS = 6
ROWS, COLUMNS = 1024, 1024
WHOLE_BYTES = TENSORS * ROWS * COLUMNS * 4


@contextlib.contextmanager
def reads(world: World, least: float, most: float) -> Iterator[None]:
    """Checks how many times the size of the file all processes read together."""
    requests = world.directory.parent / "mounted" / ".requests"
    dist.barrier()
    before = int(requests.read_text().split()[2])
    dist.barrier()
    yield
    dist.barrier()
    served = (int(requests.read_text().split()[2]) - before) / WHOLE_BYTES
    assert least <= served <= most, served


def targets(placement: Shard | Replicate) -> dict[str, torch.Tensor]:
    mesh = DeviceMesh("cpu", torch.arange(2))
    rows = ROWS // 2 if placement == Shard(0) else ROWS
    columns = COLUMNS // 2 if placement == Shard(1) else COLUMNS
    return {
        f"t{number}": DTensor.from_local(torch.zeros(rows, columns), mesh, [placement], run_check=False)
        for number in range(TENSORS)
    }


def check(tensors: dict[str, torch.Tensor]) -> None:
    for number in range(TENSORS):
        value = tensors[f"t{number}"]
        assert bool(((value.to_local() if isinstance(value, DTensor) else value) == number).all()), number


@CASES
def each_process_reads_its_rows(world: World) -> None:
    tensors = targets(Shard(0))
    with reads(world, 1, 1.25):
        std.load_into(tensors, world.directory.parent / "mounted" / "rows.safetensors")
    check(tensors)


@CASES
def replicated_tensors_are_read_once(world: World) -> None:
    tensors = targets(Replicate())
    with reads(world, 1, 1.1):
        std.load_into(tensors, world.directory.parent / "mounted" / "replicated.safetensors")
    check(tensors)


@CASES
def weights_are_read_once(world: World) -> None:
    with reads(world, 1, 1.1):
        tensors = dict(
            std.weights_iterator(world.directory.parent / "mounted" / "weights.safetensors", "cpu", dist.group.WORLD)
        )
    check(tensors)


@CASES
def without_a_group_each_process_begins_with_another_file(world: World) -> None:
    names = ["first", "second"]
    files = [world.directory.parent / "mounted" / f"{name}.safetensors" for name in names]
    order = [name for name, _ in std.weights_iterator(files)]
    assert world.share(order) == [names, names[::-1]]
    assert [name for name, _ in std.weights_iterator(files, "cpu", dist.group.WORLD, read_once="world")] == names
