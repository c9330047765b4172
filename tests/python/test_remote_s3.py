"""s3:// URLs: objects of a server that speaks S3, with what obstore takes from the environment."""

from __future__ import annotations

import datetime
from pathlib import Path

import obstore
import pytest
import safetensors.torch
import torch
from obstore.store import S3Store, from_url

import safetensors_torch
from remote_calls import CALLS, TENSORS, check_nothing_is_open, outcome, same


@pytest.fixture
def url(bucket: str, tmp_path: Path) -> str:
    """The URL of an object with TENSORS; the file is in tmp_path too."""
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    obstore.put(from_url(bucket), "models/model.safetensors", tmp_path / "model.safetensors")
    return f"{bucket}/models/model.safetensors"


@pytest.mark.parametrize("function", CALLS)
def test_each_function_reads_objects(function: str, url: str, tmp_path: Path) -> None:
    call = CALLS[function]
    assert same(call(url), call(str(tmp_path / "model.safetensors")))
    check_nothing_is_open()


def test_missing_objects_and_buckets(url: str) -> None:
    for missing in (f"{url}.none", "s3://no-such-bucket/model.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"^{missing}: "):
            safetensors_torch.load_file(missing)


def test_an_object_that_is_replaced_while_it_is_read(url: str, bucket: str) -> None:
    with safetensors_torch.safe_open(url, framework="pt") as file:
        obstore.put(from_url(bucket), "models/model.safetensors", bytes(10_000_400))
        with pytest.raises(safetensors_torch.SafetensorError, match=f"{url}: the object was replaced while"):
            file.get_tensor("large")


def test_an_empty_object(bucket: str) -> None:
    obstore.put(from_url(bucket), "empty", b"")
    with pytest.raises(safetensors_torch.SafetensorError, match=f"{bucket}/empty: "):
        safetensors_torch.load_file(f"{bucket}/empty")


@pytest.mark.parametrize("key", ["a b", "ü/ö", "a%20b", "a?b#c", "a+b&c=d"])
def test_any_key(key: str, bucket: str) -> None:
    obstore.put(from_url(bucket), key, safetensors.torch.save({"w": torch.ones(2)}))
    assert safetensors_torch.load_file(f"{bucket}/{key}")["w"].tolist() == [1, 1]


def test_a_url_that_is_signed(url: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Store(bucket.removeprefix("s3://"))
    signed = obstore.sign(store, "GET", "models/model.safetensors", datetime.timedelta(minutes=5))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert same(safetensors_torch.load_file(signed), TENSORS)


def test_no_credentials_are_in_messages(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret-password@127.0.0.1:1")
    result, shown = outcome(safetensors_torch.load_file, url)
    assert isinstance(result, type) and issubclass(result, OSError) and f"{url}: " in shown
    assert "secret" not in shown
