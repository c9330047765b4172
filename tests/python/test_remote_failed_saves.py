"""Saves to buckets that fail, are interrupted or killed: the old files stay whole, and nothing is left; and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import boto3
import pytest
import torch
import torch.distributed.checkpoint as dcp

import safetensors_torch
from bucket_proxy import BucketProxy, Call
from fresh import Process, run_python
from object_server import EXPIRED, CuttingProxy, Fault
from proc import eventually
from remote_calls import check_nothing_is_open, outcome, own_error
from safetensors_torch import SafetensorError
from safetensors_torch.distributed import HuggingFaceStorageWriter, load_into

Tensors = dict[str, torch.Tensor]

SECRETS = ("secret-key", "secret-session", "secret-password")
OLD: Tensors = {"old": torch.ones(2)}
SMALL: Tensors = {"a": torch.ones(1000)}
LARGE: Tensors = {"a": torch.ones(3_000_000)}

DENIED = Fault(403, b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
NO_BUCKET = Fault(404, b"<Error><Code>NoSuchBucket</Code><Message>The bucket does not exist</Message></Error>")
# S3 answers 200 before it knows.
FAILED = Fault(200, b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>internal</Message></Error>")


class Case(NamedTuple):
    """Which requests fail, how many of them, and what comes of it."""

    steps: tuple[str, ...]
    fault: Fault
    count: int = 1000
    error: type[Exception] | None = None
    text: str = ""


UPLOAD = ("put", "begin", "part", "complete")
CASES = {
    "503, which passes": Case(UPLOAD, Fault(503), 2),
    "500, which passes": Case(UPLOAD, Fault(500), 2),
    "503": Case(("put", "part"), Fault(503), error=OSError, text="503 Service Unavailable"),
    "denied": Case(UPLOAD, DENIED, error=PermissionError, text="AccessDenied: Access Denied"),
    "denied parts": Case(("put", "part"), DENIED, error=PermissionError, text="AccessDenied: Access Denied"),
    "denied parts and aborts": Case(("put", "part", "abort"), DENIED, error=PermissionError, text="AccessDenied"),
    "denied at the end": Case(("put", "complete"), DENIED, error=PermissionError, text="AccessDenied"),
    "expired": Case(UPLOAD, EXPIRED, error=PermissionError, text="ExpiredToken: The provided token has expired"),
    "expired at the end": Case(("put", "complete"), EXPIRED, error=PermissionError, text="ExpiredToken"),
    "no bucket": Case(UPLOAD, NO_BUCKET, error=FileNotFoundError, text="NoSuchBucket"),
    "failed at the end": Case(("complete",), FAILED, error=OSError, text="InternalError: internal"),
}


@pytest.fixture
def port(bucket: str) -> int:
    return int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])


@pytest.fixture
def proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketProxy]:
    with BucketProxy(port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def open_uploads(port: int, bucket: str) -> list[dict[str, Any]]:
    """Returns the uploads that were begun, and neither completed nor aborted."""
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    return client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://")).get("Uploads", [])


def saved(save: Callable[[], Any]) -> tuple[Any, str]:
    def call(_: str) -> Tensors:
        save()
        return {}

    return outcome(call, "")


def fail_some(proxy: BucketProxy, case: Case) -> None:
    left = [case.count]

    def fault(call: Call) -> Fault | None:
        if call.step not in case.steps or left[0] == 0:
            return None
        left[0] -= 1
        return case.fault

    proxy.fault = fault


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("case", CASES)
def test_faults(case: str, size: str, proxy: BucketProxy, bucket: str, port: int) -> None:
    url, tensors = f"{bucket}/x", SMALL if size == "small" else LARGE
    safetensors_torch.save_file(OLD, url)
    fail_some(proxy, CASES[case])
    result, shown = saved(lambda: safetensors_torch.save_file(tensors, url))
    proxy.fault = lambda call: None
    error = CASES[case].error
    if isinstance(result, dict):
        assert error is None or not {"put", "part"} & {*CASES[case].steps}
        assert safetensors_torch.load_file(url).keys() == {"a"}
    else:
        assert error is not None and issubclass(result, error), shown
        assert f"{url}: " in shown and CASES[case].text in shown
        assert safetensors_torch.load_file(url).keys() == {"old"}
    assert not [secret for secret in SECRETS if secret in shown]
    if "abort" not in CASES[case].steps:
        assert open_uploads(port, bucket) == []
    check_nothing_is_open()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sft-")]


@pytest.mark.parametrize("layout", ["final", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_faults_of_the_storage_writer(case: str, layout: str, proxy: BucketProxy, bucket: str, port: int) -> None:
    url = f"{bucket}/step"
    fail_some(proxy, CASES[case])
    writer = HuggingFaceStorageWriter(url, layout=layout)
    result, shown = saved(lambda: own_error(lambda: dcp.save(dict(LARGE), storage_writer=writer, no_dist=True)))
    proxy.fault = lambda call: None
    error = CASES[case].error
    if isinstance(result, dict):
        assert error is None
        target = {"a": torch.zeros(3_000_000)}
        load_into(target, url)
        assert torch.equal(target["a"], LARGE["a"])
    else:
        assert error is not None and issubclass(result, error), shown
        assert f"{url}/" in shown and CASES[case].text in shown
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        assert "Contents" not in client.list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    assert not [secret for secret in SECRETS if secret in shown]
    if "abort" not in CASES[case].steps:
        assert open_uploads(port, bucket) == []
    check_nothing_is_open()


# What was there: nothing, files of other names, and files of the same names, which the last step replaces.
@pytest.mark.parametrize("before", [None, 4000, 8000])
@pytest.mark.parametrize("step", range(4))
def test_a_checkpoint_whose_save_fails(
    step: int, before: int | None, proxy: BucketProxy, bucket: str, port: int
) -> None:
    url, new = f"{bucket}/d", {f"t{number}": torch.ones(3_000_000) for number in range(2)}
    old = {f"t{number}": torch.zeros(1000) for number in range(3 if before else 0)}
    if before:
        safetensors_torch.save_sharded(old, url, max_shard_size=before)
    begun: list[str] = []

    def fault(call: Call) -> Fault | None:
        # One file after the other, and then the index.
        if call.step not in ("begin", "put"):
            return None
        begun.append(call.key)
        return DENIED if len(begun) > step else None

    proxy.fault = fault
    result, shown = saved(lambda: safetensors_torch.save_sharded(new, url, max_shard_size="12MB"))
    proxy.fault = lambda call: None
    assert (result == {}) if step == 3 else (result is PermissionError and f"{url}/model" in shown), shown
    found, _ = outcome(safetensors_torch.load_sharded, url)
    if step == 3:
        assert isinstance(found, dict) and found.keys() == new.keys()
    elif before == 4000 or (before and step < 2):
        assert isinstance(found, dict) and found.keys() == old.keys()
    else:
        assert found is (SafetensorError if step == 2 else FileNotFoundError), "files without an index are not loaded"
    assert open_uploads(port, bucket) == []


@pytest.mark.parametrize("limits", [[0, 1, 100], [0] * 4, [None, 50], [300, 10, 700]])
@pytest.mark.parametrize("size", ["small", "large"])
def test_connections_that_break(
    size: str, limits: list[int | None], port: int, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, url = SMALL if size == "small" else LARGE, f"{bucket}/x"
    safetensors_torch.save_file(OLD, url)
    with CuttingProxy(port, limits) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        result, shown = saved(lambda: safetensors_torch.save_file(tensors, url))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    # obstore repeats requests, but does not read half an answer again.
    is_saved = result == {}
    assert is_saved or (limits == [300, 10, 700] and result is OSError and f"{url}: " in shown), shown
    assert safetensors_torch.load_file(url).keys() == ({"a"} if is_saved else {"old"})
    check_nothing_is_open()


def test_no_server_is_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret-password@127.0.0.1:1")
    result, shown = saved(lambda: safetensors_torch.save_file(SMALL, f"{bucket}/x"))
    assert isinstance(result, type) and issubclass(result, OSError) and f"{bucket}/x: " in shown
    assert "secret" not in shown


@pytest.mark.parametrize("save", ["save_file", "save_sharded"])
def test_a_missing_bucket(save: str, bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match="^s3://no-such-bucket/x.*: .*NoSuchBucket"):
        getattr(safetensors_torch, save)(SMALL, "s3://no-such-bucket/x")


SAVE = """
import os, signal, sys, torch, safetensors_torch
save, url, number = sys.argv[1:]
def progress(done, total):
    if done > 20_000_000:
        os.kill(os.getpid(), int(number))
signal.signal(signal.SIGINT, signal.default_int_handler)
tensors = {f"t{number}": torch.full((3_000_000,), 2.0) for number in range(4)}
try:
    if save == "save_file":
        safetensors_torch.save_file(tensors, url, progress=progress)
    else:
        safetensors_torch.save_sharded(tensors, url, max_shard_size="12MB", progress=progress)
except KeyboardInterrupt:
    import threading
    assert threading.enumerate() == [threading.main_thread()]
    print("interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("save", ["save_file", "save_sharded"])
def test_a_save_that_is_ended_by_a_signal(save: str, number: signal.Signals, bucket: str, port: int) -> None:
    url = f"{bucket}/x"
    old = {f"t{number}": torch.ones(1000) for number in range(4)}
    if save == "save_file":
        safetensors_torch.save_file(old, url)
    else:
        safetensors_torch.save_sharded(old, url, max_shard_size=4000)
    ended = run_python(SAVE, save, url, int(number))
    if number == signal.SIGINT:
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted\n", "")
        assert open_uploads(port, bucket) == []
    else:
        assert ended.returncode == -signal.SIGKILL
    loaded = safetensors_torch.load_sharded(url)
    assert {name: tensor.sum().item() for name, tensor in loaded.items()} == dict.fromkeys(old, 1000.0)


REPLACE = """
import sys, torch, safetensors_torch
tensors = {f"t{number}": torch.full((100,), 2.0) for number in range(3)}
safetensors_torch.save_sharded(tensors, sys.argv[1], max_shard_size=int(sys.argv[2]))
"""


@pytest.mark.parametrize("before, after", [(400, 400), (800, 400), (400, 4000)])
def test_a_checkpoint_is_never_mixed(before: int, after: int, proxy: BucketProxy, bucket: str) -> None:
    """Kills a save before each of its requests that change something."""
    url = f"{bucket}/d"
    states = []
    for step in range(20):
        safetensors_torch.save_sharded(
            {f"t{number}": torch.ones(100) for number in range(3)}, url, max_shard_size=before
        )
        process = Process(REPLACE, url, after)
        seen: list[Call] = []

        def fault(call: Call, process: Process = process, step: int = step, seen: list[Call] = seen) -> Fault | None:
            seen += [call] if call.is_change else []
            if len(seen) <= step:
                return None
            os.kill(process._id, signal.SIGKILL)
            return Fault(503)

        proxy.fault = fault
        process.communicate(60)
        proxy.fault = lambda call: None
        found, shown = outcome(safetensors_torch.load_sharded, url)
        if isinstance(found, dict):
            assert len(found) == 3
            states.append({tensor[0].item() for tensor in found.values()})
        else:
            assert found in (SafetensorError, FileNotFoundError), shown
            states.append(set())
        if process.returncode == 0:
            break
    assert states[0] == {1.0} and states[-1] == {2.0} and all(len(state) <= 1 for state in states), states
    # First the old ones, and at the end the new ones.
    first, last = states.count({1.0}), states.count({2.0})
    assert states == [{1.0}] * first + [set()] * (len(states) - first - last) + [{2.0}] * last, states
    if (before, after) != (400, 400):
        assert set() not in states, "files with other names replace the old ones at once"


def test_a_new_checkpoint_is_seen_when_it_is_complete(proxy: BucketProxy, bucket: str) -> None:
    seen = []

    def fault(call: Call) -> None:
        if call.is_change:
            seen.append(outcome(safetensors_torch.load_sharded, f"{bucket}/d")[0])

    proxy.fault = fault
    tensors = {f"t{number}": torch.ones(100) for number in range(3)}
    safetensors_torch.save_sharded(tensors, f"{bucket}/d", max_shard_size=400)
    assert seen[0] is FileNotFoundError and set(seen[1:]) == {SafetensorError}
    assert eventually(lambda: safetensors_torch.load_sharded(f"{bucket}/d").keys() == tensors.keys())


LOAD = """
import os, signal, sys, threading, torch, safetensors_torch
url, seconds = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    safetensors_torch.load_file(url)
except KeyboardInterrupt:
    assert threading.enumerate() == [threading.main_thread()]
    print("interrupted")
"""


# While the file is opened, and while its tensors are read.
@pytest.mark.parametrize("seconds", [0.15, 0.45])
def test_a_load_that_is_interrupted(seconds: float, proxy: BucketProxy, bucket: str) -> None:
    safetensors_torch.save_file(LARGE, f"{bucket}/x")
    proxy.seconds = 0.3
    ended = run_python(LOAD, f"{bucket}/x", seconds)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted\n", "")
