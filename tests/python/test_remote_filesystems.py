"""filesystem=, in each function that takes it; and checkpoints in buckets, on servers and in filesystems."""

from __future__ import annotations

import functools
import os
import pathlib
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import obstore
import pytest
import torch
from obstore.store import MemoryStore

import safetensors_torch
from bucket_proxy import BucketProxy, Call
from object_server import ObjectServer
from remote_calls import check_nothing_is_open, outcome, same
from remote_places import KINDS, Place, make_place
from safetensors_torch import SafetensorError
from safetensors_torch.distributed import weights_iterator
from support import Tied

Tensors = dict[str, torch.Tensor]
TENSORS: Tensors = {
    "large": torch.arange(800_000, dtype=torch.float32).view(4, 200_000),
    "matrix": torch.arange(24.0).view(4, 6).half(),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Place:
    return make_place(request.param, request)


def _model() -> torch.nn.Module:
    model = torch.nn.Module()
    for name, tensor in TENSORS.items():
        model.register_buffer(name, torch.zeros_like(tensor))
    return model


def _loaded(path: Any, **options: Any) -> Tensors:
    model = _model()
    assert safetensors_torch.load_model(model, path, **options) == (set(), [])
    return dict(model.state_dict())


def _opened(path: Any, **options: Any) -> Tensors:
    with safetensors_torch.safe_open(path, framework="pt", **options) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _inspected(path: Any, **options: Any) -> Tensors:
    info = safetensors_torch.inspect(path, **options)
    return {name: TENSORS[name] for name, tensor in info.tensors.items() if tensor.shape == list(TENSORS[name].shape)}


READS: dict[str, Callable[..., Tensors]] = {
    "load_file": safetensors_torch.load_file,
    "load_sharded": safetensors_torch.load_sharded,
    "load_model": _loaded,
    "load_model assign": lambda path, **options: _loaded(path, assign=True, **options),
    "safe_open": _opened,
    "iterate": lambda path, **options: dict(safetensors_torch.iterate(path, **options)),
    "iterate several": lambda path, **options: dict(safetensors_torch.iterate([path], **options)),
    "weights_iterator": lambda path, **options: dict(weights_iterator([path], **options)),
    "inspect": _inspected,
}
WRITES: dict[str, Callable[..., Any]] = {
    "save_file": lambda path, **options: safetensors_torch.save_file(TENSORS, path, **options),
    "save_model": lambda path, **options: safetensors_torch.save_model(_model(), path, **options),
    "save_sharded": lambda path, **options: safetensors_torch.save_sharded(TENSORS, path, **options),
}


def test_each_function_reads(place: Place) -> None:
    at = {"filesystem": place.filesystem}
    safetensors_torch.save_file(TENSORS, place.path("x"), **at)
    safetensors_torch.save_sharded(TENSORS, place.path("d"), max_shard_size=100, **at)
    for name, read in READS.items():
        assert same(read(place.path("x"), **at), TENSORS), name
        if name != "load_file":
            for path in ("d", "d/", "d/model.safetensors.index.json"):
                assert same(read(place.path(path), **at), TENSORS), (name, path)
    check_nothing_is_open()


def test_models(place: Place) -> None:
    at, model, other = {"filesystem": place.filesystem}, Tied(), Tied()
    safetensors_torch.save_model(model, place.path("x"), **at)
    assert safetensors_torch.load_model(other, place.path("x"), **at) == (set(), [])
    assert other.head.weight is other.embedding.weight and torch.equal(other.head.weight, model.head.weight)
    dropped = safetensors_torch.inspect(place.path("x"), **at).metadata
    assert dropped == {"head.weight": "embedding.weight"}


@pytest.mark.parametrize("kind", ["obstore local", "obstore s3", "fsspec memory", "fsspec file", "fsspec dir"])
def test_an_open_file_is_pickled_with_its_filesystem(kind: str, request: pytest.FixtureRequest) -> None:
    place = make_place(kind, request)
    safetensors_torch.save_file(TENSORS, place.path("x"), filesystem=place.filesystem)
    with safetensors_torch.safe_open(place.path("x"), framework="pt", filesystem=place.filesystem) as file:
        pickled = pickle.dumps(file)
    with pickle.loads(pickled) as again:
        assert torch.equal(again.get_slice("large")[1:], TENSORS["large"][1:])
    check_nothing_is_open()


@pytest.mark.parametrize("name", [*READS, *WRITES])
@pytest.mark.parametrize("filesystem", ["memory", 0, object(), MemoryStore, type(fsspec.filesystem("memory")), Path()])
def test_another_type_is_refused(filesystem: Any, name: str) -> None:
    with pytest.raises(TypeError, match="filesystem must be a store of obstore or a filesystem of fsspec, not "):
        {**READS, **WRITES}[name]("x", filesystem=filesystem)


PATHS: dict[str, tuple[Any, type[Exception], str]] = {
    "bytes": (b"x", TypeError, "a path in a filesystem must be a str, not bytes"),
    "None": (None, TypeError, "a path in a filesystem must be a str, not NoneType"),
    "null byte": ("a\0b", ValueError, "embedded null byte in the path 'a"),
    "URL": ("s3://user:secret@bucket/x", ValueError, "^s3://bucket/x is a URL; pass the path in the filesystem"),
}


@pytest.mark.parametrize("name", [*READS, *WRITES])
@pytest.mark.parametrize("case", PATHS)
def test_another_path_is_refused(case: str, name: str) -> None:
    path, error, text = PATHS[case]
    if path is None and name == "iterate":
        path = [None]
    with pytest.raises(error, match=text):
        {**READS, **WRITES}[name](path, filesystem=MemoryStore())


def test_paths_may_be_objects() -> None:
    store = MemoryStore()
    safetensors_torch.save_file(TENSORS, pathlib.PurePosixPath("d/x"), filesystem=store)
    assert same(safetensors_torch.load_file(pathlib.PurePosixPath("d/x"), filesystem=store), TENSORS)


def test_the_root_of_a_store() -> None:
    store = MemoryStore()
    safetensors_torch.save_sharded(TENSORS, "", max_shard_size=100, filesystem=store)
    assert same(safetensors_torch.load_sharded("", filesystem=store), TENSORS)


def test_a_url_that_the_filesystem_knows() -> None:
    memory = fsspec.filesystem("memory")
    safetensors_torch.save_file(TENSORS, "memory://urls/x", filesystem=memory)
    assert same(safetensors_torch.load_file("memory://urls/x"), TENSORS)
    memory.rm("/urls", recursive=True)


@pytest.fixture
def checkpoint(place: Place) -> Place:
    """A place with a checkpoint of three files and a variant in the directory d."""
    at = {"filesystem": place.filesystem}
    safetensors_torch.save_sharded(TENSORS, place.path("d"), max_shard_size=10, **at)
    put(place, "d/model.fp16.safetensors", safetensors_torch.save({"half": torch.ones(2).half()}))
    return place


def put(place: Place, name: str, content: bytes) -> None:
    filesystem = place.filesystem
    if filesystem is None and place.root.startswith("s3:"):
        bucket, _, root = place.root.removeprefix("s3://").partition("/")
        obstore.put(obstore.store.from_url(f"s3://{bucket}"), f"{root}/{name}", content)
    elif type(filesystem).__module__.startswith("obstore"):
        obstore.put(filesystem, place.path(name), content)
    else:
        (filesystem or fsspec.filesystem("memory")).pipe_file(place.path(name), content)


INDEX = "d/model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"
# What is written, what is read, and the error.
BROKEN: dict[str, tuple[dict[str, bytes], str, type[Exception], str]] = {
    "no directory": ({}, "none", FileNotFoundError, "none: "),
    "an empty directory": ({}, "none/", SafetensorError, "none/: the directory holds no checkpoint"),
    "an empty file": ({"x": b""}, "x", SafetensorError, "x: a safetensors file begins with 8 bytes"),
    "no file": ({INDEX: b'{"weight_map": {"a": "none.safetensors"}}'}, INDEX, FileNotFoundError, "none.safetensors"),
    "outside": ({INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'}, "d", SafetensorError, "../x.safetensors"),
    "no index": ({INDEX: b"<html>"}, "d", SafetensorError, f"{INDEX}: "),
    "no tensor": (
        {INDEX: b'{"weight_map": {"none": "%s"}}' % FIRST.encode()},
        "d",
        SafetensorError,
        "not of one checkpoint",
    ),
    "cut": ({f"d/{FIRST}": b"\x08"}, "d", SafetensorError, f"{FIRST}: a safetensors file begins with 8 bytes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case: str, checkpoint: Place) -> None:
    files, path, error, text = BROKEN[case]
    for name, content in files.items():
        put(checkpoint, name, content)
    for name in ("load_sharded", "safe_open", "iterate", "inspect"):
        read = functools.partial(READS[name], filesystem=checkpoint.filesystem)
        result, shown = outcome(read, checkpoint.path(path))
        assert isinstance(result, type) and issubclass(result, error) and text in shown, (name, shown)
        assert checkpoint.root in shown
    check_nothing_is_open()


def test_variants(checkpoint: Place) -> None:
    at = {"filesystem": checkpoint.filesystem}
    loaded = safetensors_torch.load_sharded(checkpoint.path("d"), variant="fp16", **at)
    assert loaded.keys() == {"half"}
    with safetensors_torch.safe_open(checkpoint.path("d/"), "pt", variant="fp16", **at) as file:
        assert file.keys() == ["half"]
    with pytest.raises(SafetensorError, match="fp8"):
        safetensors_torch.load_sharded(checkpoint.path("d"), variant="fp8", **at)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectServer]:
    """A server, which lists no directories."""
    safetensors_torch.save_sharded(TENSORS, tmp_path / "d e", max_shard_size=100)
    safetensors_torch.save_file(TENSORS, tmp_path / "model.safetensors")
    with ObjectServer(tmp_path) as server:
        yield server


@pytest.mark.parametrize("name", [name for name in READS if name != "load_file"])
def test_a_server_that_lists_no_directories(name: str, server: ObjectServer) -> None:
    for path in ("d e/model.safetensors.index.json", "d e", "d e/", "model.safetensors"):
        assert same(READS[name](server.url(path)), TENSORS), path
    result, shown = outcome(READS[name], server.url("none"))
    assert result is FileNotFoundError and "its files cannot be listed; name its file or its index" in shown
    check_nothing_is_open()


def test_a_signature_is_sent_with_each_request(server: ObjectServer) -> None:
    server.signature = "secret-signature"
    assert same(safetensors_torch.load_sharded(server.url("d e")), TENSORS)
    (server.directory / "d e" / "model-00002-of-00002.safetensors").unlink()
    result, shown = outcome(safetensors_torch.load_sharded, server.url("d e"))
    assert result is FileNotFoundError and "model-00002-of-00002.safetensors: " in shown and "secret" not in shown


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketProxy]:
    with BucketProxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def test_headers_are_read_at_once(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((100,), float(number)) for number in range(8)}
    safetensors_torch.save_sharded(tensors, tmp_path, max_shard_size=400)
    with ObjectServer(tmp_path) as server:
        safetensors_torch.inspect(server.url("model.safetensors.index.json"))
        server.delay = 0.05
        start = time.monotonic()
        safetensors_torch.inspect(server.url("model.safetensors.index.json"))
        # One request for the index, one for each file, and one for the index again.
        assert 0.1 <= time.monotonic() - start < 8 * 0.05
        assert len(server.requests) <= 2 * 10


@pytest.mark.parametrize("size", [400, 900])
def test_an_index_that_is_replaced_while_it_is_opened(size: int, proxy: BucketProxy, bucket: str) -> None:
    """By another one, or by the same with other values in the files."""
    old, new = ({f"t{number}": torch.full((100,), value) for number in range(4)} for value in (1.0, 2.0))
    safetensors_torch.save_sharded(old, f"{bucket}/d", max_shard_size=400)
    saves = [1]

    def fault(call: Call) -> None:
        if call.step == "get" and "-of-" in call.key and saves:
            saves.pop()
            time.sleep(1.1)  # S3 tells the second
            safetensors_torch.save_sharded(new, f"{bucket}/d", max_shard_size=size)

    proxy.fault = fault
    loaded = safetensors_torch.load_sharded(f"{bucket}/d")
    assert same(loaded, new) and saves == []
