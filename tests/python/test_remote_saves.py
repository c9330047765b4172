"""Saves to buckets and other filesystems: the bytes of a local save, which appear complete and in the right order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import safetensors_torch
from bucket_proxy import BucketProxy
from remote_calls import check_nothing_is_open
from remote_places import KINDS, Place, local_files, make_place
from support import Tied

Tensors = dict[str, torch.Tensor]


def tensors_of(nbytes: int) -> Tensors:
    return {f"t{number}": torch.full((nbytes // 4,), number, dtype=torch.float32) for number in range(6)}


SIX = tensors_of(400)
# The last has parts.
CONTENTS: dict[str, Tensors] = {
    "no tensors": {},
    "no bytes": {"empty": torch.zeros(0, 3)},
    "1 MB": {"a": torch.arange(250_000, dtype=torch.float32)},
    "40 MB": {"a": torch.arange(10_000_000, dtype=torch.float32), "b": torch.ones(3, dtype=torch.bool)},
}


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Place:
    return make_place(request.param, request)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    (tmp_path / "local").mkdir()
    return tmp_path / "local"


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketProxy]:
    with BucketProxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_has_the_bytes_of_a_local_one(content: str, place: Place, local: Path) -> None:
    for target, filesystem in ((local / "x", None), (place.path("x"), place.filesystem)):
        safetensors_torch.save_file(CONTENTS[content], target, {"key": "value"}, durable=True, filesystem=filesystem)
    assert place.files() == local_files(local)
    check_nothing_is_open()


TRANSPOSED = torch.arange(6.0).view(2, 3).t()
OPTIONS: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "metadata": (SIX, {"metadata": {"ü": "ö\n"}}),
    "no metadata": (SIX, {"metadata": None}),
    "empty metadata": (SIX, {"metadata": {}}),
    "not contiguous": ({"a": TRANSPOSED}, {"force_contiguous": True}),
    "shared": ({"a": SIX["t1"], "b": SIX["t1"], "c": SIX["t1"][:3]}, {"shared": "keep_one"}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, bucket: str, request: pytest.FixtureRequest, local: Path) -> None:
    tensors, options = OPTIONS[case]
    place = make_place("s3://", request)
    safetensors_torch.save_file(tensors, local / "x", **options)
    safetensors_torch.save_file(tensors, place.path("x"), **options)
    safetensors_torch.save_sharded(tensors, local / "d", max_shard_size=400, **options)
    safetensors_torch.save_sharded(tensors, place.path("d"), max_shard_size=400, **options)
    assert place.files() == local_files(local)


def test_a_failed_check_asks_for_nothing(proxy: BucketProxy, bucket: str) -> None:
    for tensors, error in (({"a": TRANSPOSED}, ValueError), ({"a": SIX["t1"], "b": SIX["t1"]}, RuntimeError)):
        for save in (safetensors_torch.save_file, safetensors_torch.save_sharded):
            with pytest.raises(error):
                save(tensors, f"{bucket}/x")
    assert proxy.calls == []


SAVES: dict[str, Callable[..., Any]] = {
    "save_file": safetensors_torch.save_file,
    "save_sharded": lambda tensors, path, **options: safetensors_torch.save_sharded(
        tensors, path, max_shard_size=20_000_000, **options
    ),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("progress", ["function", "bar"])
def test_progress(progress: str, save: str, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    report = True if progress == "bar" else lambda done, total: seen.append((done, total))
    SAVES[save](tensors_of(8_000_000), f"{bucket}/x", progress=report)
    if progress == "bar":
        assert "100%" in capsys.readouterr().err
    else:
        assert seen == sorted(seen) and len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]
        assert seen[-1][1] > 48_000_000


class Stop(Exception):
    pass


@pytest.mark.parametrize("save", SAVES)
def test_an_exception_from_progress_leaves_what_was_there(
    save: str, place: Place, request: pytest.FixtureRequest
) -> None:
    def stop(done: int, total: int) -> None:
        if done > 30_000_000:
            raise Stop

    for before in ({}, SIX):
        if before:
            SAVES[save](before, place.path("x"), filesystem=place.filesystem)
        found = place.files()
        with pytest.raises(Stop):
            SAVES[save](tensors_of(8_000_000), place.path("x"), filesystem=place.filesystem, progress=stop)
        assert place.files() == found
    check_nothing_is_open()
    if "bucket" in request.fixturenames or "s3" in place.root:
        assert open_uploads(request.getfixturevalue("bucket")) == []


def open_uploads(bucket: str) -> list[str]:
    """Returns the keys of the uploads that were begun, and neither completed nor aborted."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    answer = client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in answer.get("Uploads", [])]


@pytest.mark.parametrize("name", ["a b", "ü/ö", "a%20b", "a?b#c", "a+b&c=d", "a[1]*", "[!a]"])
def test_any_name(name: str, place: Place, local: Path) -> None:
    if "?" in name and place.root.startswith("memory://"):
        name = name.replace("?", "")  # in such a URL, a query begins with it
    (local / name).parent.mkdir(exist_ok=True)
    for directory, filesystem in ((str(local), None), (place.root, place.filesystem)):
        safetensors_torch.save_file(SIX, f"{directory}/{name}", filesystem=filesystem)
        safetensors_torch.save_sharded(SIX, f"{directory}/d/{name}", max_shard_size=800, filesystem=filesystem)
    assert place.files() == local_files(local)
    with safetensors_torch.safe_open(place.path(name), "pt", filesystem=place.filesystem) as file:
        assert sorted(file.keys()) == sorted(SIX)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "a file": ("m.safetensors", {}),
    "a directory": ("m/", {}),
    "several files": ("m", {"max_shard_size": 200}),
    "named": ("m/", {"prefix": "a.", "rename": str.upper, "metadata": {"key": "value"}}),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, place: Place, local: Path) -> None:
    name, options = MODELS[case]
    model = Tied()
    if name.endswith("/"):
        (local / name).mkdir()
    safetensors_torch.save_model(model, f"{local}/{name}", **options)
    safetensors_torch.save_model(model, place.path(name), filesystem=place.filesystem, **options)
    assert place.files() == local_files(local)


# The steps from one checkpoint to the next, by the most bytes of a file.
SIZES = (400, 400, 900, "1MB", "1MB", 900, 401)


def test_a_checkpoint_replaces_another(place: Place, local: Path) -> None:
    safetensors_torch.save_file(SIX, local / "other.safetensors")
    safetensors_torch.save_file(SIX, place.path("other.safetensors"), filesystem=place.filesystem)
    for number, size in enumerate(SIZES):
        tensors = {name: tensor + number for name, tensor in SIX.items()}
        expected = safetensors_torch.save_sharded(tensors, local, max_shard_size=size)
        saved = safetensors_torch.save_sharded(tensors, place.root, max_shard_size=size, filesystem=place.filesystem)
        assert saved == expected and place.files() == local_files(local), (number, size)


def shards(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What was there, and the requests that change it.
ORDERS: dict[str, tuple[tuple[int | None, int], list[str]]] = {
    "nothing": ((None, 900), [*shards(3), INDEX]),
    "as many files": ((900, 900), [f"-{INDEX}", *shards(3), INDEX]),
    "more files": ((400, 900), [*shards(3), INDEX, *(f"-{name}" for name in shards(6))]),
    "one file": ((9000, 900), [*shards(3), INDEX, f"-{ONE}"]),
    "several files, now one": ((900, 9000), [ONE, f"-{INDEX}", *(f"-{name}" for name in shards(3))]),
    "one file again": ((9000, 9000), [ONE]),
}


@pytest.mark.parametrize("case", ORDERS)
def test_the_order_in_which_files_appear(case: str, proxy: BucketProxy, bucket: str) -> None:
    (before, after), expected = ORDERS[case]
    if before:
        safetensors_torch.save_sharded(SIX, f"{bucket}/d", max_shard_size=before)
    proxy.calls.clear()
    safetensors_torch.save_sharded(SIX, f"{bucket}/d", max_shard_size=after)
    changes = [call for call in proxy.calls if call.is_change]
    assert [call.key.replace("d/", "-" if call.step == "delete" else "", 1) for call in changes] == expected


def test_large_files_are_sent_in_parts(proxy: BucketProxy, bucket: str) -> None:
    safetensors_torch.save_file(CONTENTS["40 MB"], f"{bucket}/x")
    assert sorted(proxy.steps()) == ["begin", "complete", *["part"] * 5]
    assert proxy.steps()[0] == "begin" and proxy.steps()[-1] == "complete"


def test_servers_of_http_are_only_read(tmp_path: Path) -> None:
    for save in SAVES.values():
        with pytest.raises(OSError, match="http://127.0.0.1:1/x.*: files of a server of HTTP are only read") as caught:
            save(SIX, "http://user:secret-password@127.0.0.1:1/x?sig=secret-signature")
        assert "secret" not in str(caught.value)
