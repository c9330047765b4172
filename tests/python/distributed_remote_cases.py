"""The cases of test_distributed_remote: four processes and a bucket, whose URL is in BUCKET.

A test server has the bucket. Some cases use a local directory through a filesystem of fsspec or a store of obstore.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import fsspec
import obstore
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.implementations.local import LocalFileSystem
from obstore.store import LocalStore, from_url
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import safetensors_torch
from distributed_tensors import Tensors, distributed, divide, equal, failing, local, meshes, strays
from ranks import Cases, World
from safetensors_torch import _upload
from safetensors_torch import distributed as std
from safetensors_torch.distributed import _remote_save

CASES = Cases()


def bucket(world: World) -> str:
    return f"{os.environ['BUCKET']}/{world.directory.name}"


def content(url: str) -> dict[str, bytes]:
    """Returns the objects in a directory of the bucket, by name."""
    store = from_url(url)
    return {
        entry["path"]: bytes(obstore.get(store, entry["path"]).bytes())
        for entry in obstore.list_with_delimiter(store)["objects"]
    }


def expected(tensors: Tensors, world: World, size: int | str) -> dict[str, bytes]:
    """Returns the files that save_sharded writes for whole tensors."""
    directory = world.directory / f"expected-{world.rank}-{size}"
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors_torch.save_sharded(contiguous, directory, max_shard_size=size)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@contextlib.contextmanager
def small_batches() -> Iterator[None]:
    """Makes rows of some tensors larger than a batch."""
    with mock.patch.multiple(_remote_save, _SMALLEST_BATCH=100, _LARGEST_BATCH=100):
        yield


def check_loads(path: str, whole: Tensors, mine: Tensors, **options: Any) -> None:
    """Checks that load_into and our reader fill divided and whole tensors."""
    for tensors in (mine, whole):
        target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        assert std.load_into(target, path, **options) == ([], [])
        assert all(equal(local(target[name]), local(tensors[name])) for name in tensors)
        target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        dcp.load(target, storage_reader=std.HuggingFaceStorageReader(path, **options))
        assert all(equal(local(target[name]), local(tensors[name])) for name in tensors)


@CASES
def files_in_a_bucket_are_those_of_save_sharded(world: World) -> None:
    whole, mine = distributed()
    url = bucket(world)
    # A checkpoint of the same names, of fewer files, and of one without an index.
    for size, batches in ((300, contextlib.nullcontext()), (300, small_batches()), (600, small_batches())):
        with batches:
            names = std.save(mine, url, max_shard_size=size)
        wanted = expected(whole, world, size)
        assert sorted(names) == sorted(wanted) and names[-1].endswith(".json") and len(names) > 4
        assert content(url) == wanted
        dist.barrier()
    check_loads(url, whole, mine)
    assert std.save(mine, url) == ["model.safetensors"]
    assert content(url) == expected(whole, world, "5GB")


@CASES
def tensors_larger_than_a_batch(world: World) -> None:
    whole = {"rows": torch.randn(3, 5, 70), "columns": torch.arange(160.0).reshape(2, 80), "long": torch.arange(50)}
    mesh = meshes()[0]
    mine = {
        "rows": divide(whole["rows"], mesh, [Shard(1)]),
        "columns": divide(whole["columns"], mesh, [Shard(1)]),
        "long": divide(whole["long"], mesh, [Shard(0)]),
    }
    with small_batches():
        std.save(mine, bucket(world))
    assert content(bucket(world)) == expected(whole, world, "5GB")


@CASES
def paths_in_a_filesystem(world: World) -> None:
    whole, mine = distributed()
    for kind, filesystem in (("fsspec", fsspec.filesystem("file")), ("obstore", LocalStore(str(world.directory)))):
        path = kind if kind == "obstore" else str(world.directory / kind)
        for size in (300, "5GB"):
            std.save(mine, path, max_shard_size=size, filesystem=filesystem)
            directory = world.directory / kind
            assert {file.name: file.read_bytes() for file in directory.iterdir()} == expected(whole, world, size)
            dist.barrier()
        check_loads(path, whole, mine, filesystem=filesystem)
        for layout in ("final", "shards"):
            writer = std.HuggingFaceStorageWriter("/nowhere", layout=layout, filesystem=filesystem)
            dcp.save(mine, checkpoint_id=f"{path}-{layout}", storage_writer=writer)
            check_loads(f"{path}-{layout}", whole, mine, filesystem=filesystem)


@CASES
def two_processes_save_and_one_or_four_load(world: World) -> None:
    url = bucket(world)
    whole = {"w": torch.arange(35.0).reshape(7, 5), "half": torch.arange(6).half(), "scalar": torch.tensor(3)}
    if world.rank < 2:
        pair = DeviceMesh("cpu", torch.arange(2), _init_backend=False)
        mine = {**whole, "w": divide(whole["w"], pair, [Shard(0)]), "half": divide(whole["half"], pair, [Replicate()])}
        std.save(mine, f"{url}/save", max_shard_size=100, process_group=world.pair)
        for layout in ("final", "shards"):
            writer = std.HuggingFaceStorageWriter(f"{url}/{layout}", layout=layout, process_group=world.pair)
            dcp.save(mine, storage_writer=writer, process_group=world.pair)
    dist.barrier()
    mesh = meshes()[0]
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    for name in ("save", "final", "shards"):
        quarter = {
            key: divide(torch.zeros_like(value), meshes()[0], [Shard(0)])
            for key, value in whole.items()
            if key != "scalar"
        }
        assert std.load_into(quarter, f"{url}/{name}", strict=False) == ([], ["scalar"])
        for key, value in quarter.items():
            assert equal(value.to_local(), divide(whole[key], mesh, [Shard(0)]).to_local()), (name, key)
        target = {key: torch.zeros_like(value) for key, value in whole.items()}
        std.load_into(target, f"{url}/{name}", process_group=alone)
        assert all(equal(target[key], whole[key]) for key in whole), name
        loaded = std.load_dtensors(f"{url}/{name}", mesh, [Shard(0)])
        assert equal(loaded["w"].to_local(), quarter["w"].to_local())
    if world.rank == 0:
        for name in ("save", "final"):
            loaded = safetensors_torch.load_sharded(f"{url}/{name}")
            assert all(equal(loaded[key], whole[key]) for key in whole), name


@CASES
def a_process_that_fails_leaves_the_old_checkpoint(world: World) -> None:
    url = bucket(world)
    std.save(distributed()[1], url, max_shard_size=300)
    before = content(url)
    other = distributed(seed=1)[1]
    mine = ConnectionError("no more")

    def interrupt(done: int, total: int) -> None:
        if world.rank == 2:
            raise mine

    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if world.rank == 2:
                raise mine
            return super().resolve_data(write_item)

    with failing(ConnectionError if world.rank == 2 else RuntimeError, text="no more"):
        std.save(other, url, max_shard_size=300, progress=interrupt)
    for method in ("__init__", "write", "commit"):
        # In the last one, other processes have put their files in place, and remove them.
        patch = mock.patch.object(_upload.Upload, method, side_effect=OSError("refused"))
        target = f"{url}/other" if method == "commit" else url
        with patch if world.rank == 1 else contextlib.nullcontext():
            with failing(OSError if world.rank == 1 else RuntimeError, text="refused"):
                std.save(other, target, max_shard_size=300)
    for target in (f"{url}/elsewhere", str(world.directory)):
        with failing(ValueError if world.rank == 0 else RuntimeError, text="rank 2 saves to"):
            std.save(other, target if world.rank == 2 else url)
    with failing(CheckpointException, text="no more"):
        dcp.save(other, storage_writer=std.HuggingFaceStorageWriter(url, layout="final"), planner=Failing())
    dist.barrier()
    assert content(url) == before
    assert content(f"{url}/other") == {}
    # The hidden files of a filesystem that has such.
    filesystem = fsspec.filesystem("file")
    with failing(ConnectionError if world.rank == 2 else RuntimeError, text="no more"):
        std.save(other, str(world.directory / "local"), max_shard_size=300, progress=interrupt, filesystem=filesystem)
    dist.barrier()
    assert strays(world.directory / "local") == os.listdir(world.directory / "local") == []


@CASES
def dcp_saves_to_a_bucket(world: World) -> None:
    url = bucket(world)
    options = {"save_distributed": True, "enable_consolidation": True}
    writer = std.HuggingFaceStorageWriter(f"{url}/0", **options)
    assert writer.path == f"{url}/0"
    for number in range(3):
        whole, mine = distributed(seed=number)
        if number == 2:  # the plan of one process changes
            whole["extra"] = torch.arange(3)
            mine |= {"extra": whole["extra"]} if world.rank == 1 else {}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(mine, checkpoint_id=f"{url}/{number}", storage_writer=writer, planner=planner)
        assert sorted(content(f"{url}/{number}")) == [
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
        ]
        target = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
        dcp.load(target, checkpoint_id=f"{url}/{number}", storage_reader=std.HuggingFaceStorageReader(f"{url}/none"))
        assert all(equal(target[name], whole[name]) for name in whole), number
    mapping = {name: 1 + number % 3 for number, name in enumerate(whole)}
    dcp.save(mine, storage_writer=std.HuggingFaceStorageWriter(f"{url}/2", mapping, **options))
    assert sorted(content(f"{url}/2"))[-2:] == ["model-00003-of-00003.safetensors", "model.safetensors.index.json"]
    check_loads(f"{url}/2", whole, mine if "extra" in mine else mine | {"extra": whole["extra"]})
    loaded = safetensors_torch.load_sharded(f"{url}/2")
    assert all(equal(loaded[name], whole[name]) for name in whole)


@CASES
def dcp_saves_shards_to_a_bucket(world: World) -> None:
    url = bucket(world)
    for number in range(2):
        whole, mine = distributed(seed=number)
        if number == 0:
            mine |= {"old": divide(torch.zeros(4), meshes()[0], [Shard(0)])}
        writer = std.HuggingFaceStorageWriter(url, {name: 1 + number for name in mine}, save_distributed=True)
        dcp.save(mine, storage_writer=writer)
        dist.barrier()
    count = 2
    names = [f"shard-{rank:05d}-model-{count:05d}-of-{count:05d}.safetensors" for rank in range(1, world.size + 1)]
    assert sorted(content(url)) == names
    check_loads(url, whole, mine)
    dist.barrier()
    if world.rank == 0:
        obstore.delete(from_url(url), names[1])
    dist.barrier()
    with failing(safetensors_torch.SafetensorError, text="a file is missing"):
        std.load_into(mine, url)


@CASES
def dcp_saves_to_a_bucket_in_the_background(world: World) -> None:
    whole, mine = distributed()
    url = bucket(world)
    dcp.async_save(mine, storage_writer=std.HuggingFaceStorageWriter(url, layout="final")).result()
    dist.barrier()
    check_loads(url, whole, mine)


@CASES
def plans_of_other_processes_are_refused(world: World) -> None:
    url = bucket(world)
    tensors = {"w": torch.arange(4.0)}
    if world.rank < 2:
        with failing(CheckpointException, text="pass process_group to the writer too"):
            writer = std.HuggingFaceStorageWriter(url, layout="final")
            dcp.save(tensors, storage_writer=writer, process_group=world.pair)
    dist.barrier()
    assert content(url) == {}
    dist.barrier()
    # One process that saves by itself sends nothing.
    if world.rank == 3:
        dcp.save(tensors, storage_writer=std.HuggingFaceStorageWriter(url, layout="final"), no_dist=True)
        assert safetensors_torch.load_sharded(url)["w"].tolist() == [0, 1, 2, 3]


@CASES
def each_process_reads_its_bytes(world: World) -> None:
    class Counting(LocalFileSystem):
        nbytes = 0
        cachable = False

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
            data = super().cat_file(path, start, end, **options)
            self.nbytes += len(data)
            return data

    filesystem = Counting()
    whole = torch.arange(4_000_000, dtype=torch.float32).reshape(4000, 1000)
    mesh = meshes()[0]
    std.save({"w": divide(whole, mesh, [Shard(0)])}, str(world.directory), filesystem=filesystem)
    dist.barrier()
    # The first MiB has the header.
    for placements, read_once, least, most in (
        ([Shard(0)], "auto", 4e6, 4e6 + (2 << 20)),
        ([Replicate()], False, 16e6, 16e6 + (2 << 20)),
    ):
        filesystem.nbytes = 0
        target = divide(torch.zeros_like(whole), mesh, placements)
        std.load_into({"w": target}, str(world.directory), read_once=read_once, filesystem=filesystem)
        assert equal(target.to_local(), divide(whole, mesh, placements).to_local())
        assert least <= filesystem.nbytes <= most, filesystem.nbytes
    # Files in a store count as those of a network filesystem.
    filesystem.nbytes = 0
    target = divide(torch.zeros_like(whole), mesh, [Replicate()])
    std.load_into({"w": target}, str(world.directory), filesystem=filesystem)
    assert equal(target.to_local(), whole)
    assert sum(world.share(filesystem.nbytes)) <= 16e6 + 4 * (2 << 20)
