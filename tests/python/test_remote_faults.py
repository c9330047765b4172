"""Faults of servers and networks: each function that reads a URL returns the tensors, or raises the right error."""

from __future__ import annotations

import collections
import contextlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import fsspec.exceptions
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

import safetensors_torch
from object_server import CUT, EXPIRED, REPLACED, SLOW, STALLED, CuttingProxy, Fault, ObjectServer, redirect
from remote_calls import CALLS, TENSORS, Tensors, check_nothing_is_open, outcome, same
from safetensors_torch import SafetensorError, _store_fsspec, _store_obstore, _stores

SECRETS = ("secret-session", "secret-signature", "secret-password")


class Case(NamedTuple):
    """What a server does, and what comes of it: the tensors, or an error.

    faults: of the first answers to reads of tensors.
    lasting: of all further ones.
    opening: of the answers when the file is opened.
    limits: of a proxy.
    """

    faults: Iterable[Fault | int] = ()
    lasting: Fault | int | None = None
    opening: Iterable[Fault | int] = ()
    limits: Callable[[], Iterable[int | None]] | None = None
    stalls: bool = False
    server: dict[str, Any] = {}
    error: type[Exception] | None = None
    text: str = ""


UNTAGGED = {"etag": None}
CASES = {
    # The request is repeated.
    "503": Case([503, 503]),
    "500": Case([500, 500]),
    "429": Case([429]),
    "408": Case([408]),
    "cut": Case([CUT, CUT]),
    "cut, no tag": Case([CUT, CUT], server=UNTAGGED),
    "cut, weak tag": Case([CUT], server={"etag": 'W/"one"'}),
    "empty answer": Case([Fault(share=0)]),
    "stalled": Case([STALLED]),
    "stalled, no tag": Case([STALLED], server=UNTAGGED),
    "slow": Case(lasting=SLOW),
    "503 while it is opened": Case(opening=[503, 503]),
    "cut while it is opened": Case(opening=[CUT]),
    "stalled while it is opened": Case(opening=[STALLED]),
    "connections that break": Case(limits=lambda: (random.Random(1).randrange(4 << 20) for _ in range(4))),
    "connections that break at once": Case(limits=lambda: [0, 1, 100]),
    "connections that stall": Case(limits=lambda: [300, None, 2 << 20], stalls=True),
    # The server differs from others.
    "no tag": Case(server=UNTAGGED),
    "no tag, no time": Case(server={"etag": None, "modified": None}),
    "weak tag": Case(server={"etag": 'W/"one"'}),
    "signed": Case(server={"signature": "secret-signature"}),
    "no ranges": Case(server={"has_ranges": False}),
    "no ranges, cut": Case(opening=[CUT, CUT], server={"has_ranges": False}),
    # The answer is final.
    "403": Case(lasting=403, error=PermissionError),
    "401": Case(lasting=401, error=PermissionError),
    "404": Case(lasting=404, error=FileNotFoundError),
    "400": Case(lasting=400, error=OSError),
    "expired": Case(lasting=EXPIRED, error=PermissionError, text="ExpiredToken: The provided token has expired"),
    "412": Case(lasting=412, error=SafetensorError, text="the object was replaced while it was read"),
    "replaced": Case(lasting=REPLACED, error=SafetensorError, text="the object was replaced while it was read"),
    "replaced, no tag": Case(
        lasting=Fault(headers={"Last-Modified": REPLACED.headers["Last-Modified"]}),
        server=UNTAGGED,
        error=SafetensorError,
        text="the object was replaced while it was read",
    ),
    "403 while it is opened": Case(opening=[403] * 2, error=PermissionError),
    "404 while it is opened": Case(opening=[404] * 2, error=FileNotFoundError),
    "expired while it is opened": Case(opening=[EXPIRED] * 2, error=PermissionError, text="ExpiredToken"),
    "signed with another key": Case(opening=[Fault(403, EXPIRED.body)], error=PermissionError),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("objects")
    safetensors.torch.save_file(TENSORS, directory / "model.safetensors", {"key": "value"})
    return directory


@pytest.fixture(scope="module")
def expected(directory: Path) -> dict[str, Tensors]:
    """What each call returns for the local file."""
    return {name: call(str(directory / "model.safetensors")) for name, call in CALLS.items()}


@pytest.fixture
def server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setattr(_store_obstore, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(_store_obstore, "_STALL_SECONDS", 0.3)
    with ObjectServer(directory) as server:
        yield server


def repeats(server: ObjectServer) -> collections.Counter[str | None]:
    """Returns how often each range behind the header was asked for."""
    return collections.Counter(
        request.headers.get("range")
        for request in server.requests
        if not request.headers.get("range", "bytes=0-").startswith("bytes=0-")
    ) or collections.Counter([None])


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("case", CASES)
def test_faults(case: str, function: str, server: ObjectServer, expected: dict[str, Tensors]) -> None:
    faults, lasting, opening, limits, stalls, attributes, error, text = CASES[case]
    for name, value in attributes.items():
        setattr(server, name, value)
    # Reads of tensors begin behind the header.
    server.faulty_from = 0 if opening else 1
    server.faults, server.head_faults, server.lasting_fault = [*faults, *opening], [*opening], lasting
    with contextlib.ExitStack() as stack:
        url = server.url()
        if limits:
            url = stack.enter_context(CuttingProxy(server.server_port, limits(), stalls=stalls)).url(url)
        result, shown = outcome(CALLS[function], url)
        if isinstance(result, dict):
            assert error is None and same(result, expected[function])
            assert server.faults == [], "the faults were met"
        else:
            assert error is not None and issubclass(result, error), shown
            assert f"{_stores.title_of_url(url)}: " in shown and text in shown
            # Whichever of the tensors was first.
            assert opening or 'for tensor "' in shown
            assert max(repeats(server).values()) == 1, "final answers are not asked for again"
        assert not [secret for secret in SECRETS if secret in shown]
        check_nothing_is_open()


def test_a_server_that_stays_broken_is_given_up(server: ObjectServer) -> None:
    server.faulty_from, server.lasting_fault = 1, 503
    result, shown = outcome(CALLS["get_tensor"], server.url())
    assert result is OSError and f"{server.url()}: " in shown and "503 Service Unavailable; the bytes were" in shown
    # The retries of obstore alone.
    assert max(repeats(server).values()) == 6
    check_nothing_is_open()


def test_no_server_is_an_error(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with CuttingProxy(server.server_port, []) as proxy:
        url = proxy.url(server.url())
    result, shown = outcome(safetensors_torch.load_file, url)
    assert isinstance(result, type) and issubclass(result, OSError) and f"{url}: " in shown
    check_nothing_is_open()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status: int, server: ObjectServer, directory: Path) -> None:
    with ObjectServer(directory) as other:
        other.signature = "secret-signature"
        server.lasting_fault = redirect(other.url(), status)
        server.head_faults = [redirect(other.url(), status)]
        assert same(safetensors_torch.load_file(server.url()), TENSORS)
        # The condition goes to the server that can check it.
        assert {request.headers.get("if-match") for request in other.requests[1:]} <= {None, '"one"'}
        server.lasting_fault = redirect(server.url(), status)
        result, shown = outcome(safetensors_torch.load_file, server.url())
        assert isinstance(result, type) and issubclass(result, OSError) and f"{server.url()}: " in shown


@pytest.mark.parametrize(
    "name", ["a b.safetensors", "a%20b.safetensors", "ü/ö.safetensors", "a#b?c=d.safetensors", "a+b&c"]
)
def test_any_path(name: str, server: ObjectServer, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / name)
    server.directory = tmp_path
    assert safetensors_torch.load_file(server.url(name))["w"].tolist() == [1, 1]


def test_a_path_that_is_not_encoded(server: ObjectServer, tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "ü b")
    server.directory = tmp_path
    assert safetensors_torch.load_file(f"http://127.0.0.1:{server.server_port}/ü b")["w"].tolist() == [1, 1]


def test_the_names_in_an_index_are_names(server: ObjectServer, tmp_path: Path) -> None:
    """Of files in the directory, whatever characters they have."""
    directory = tmp_path / "my dir"
    directory.mkdir()
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    server.directory = tmp_path
    for name in ("a b.safetensors", "a?b#c.safetensors", "ü%20.safetensors"):
        safetensors.torch.save_file({"w": torch.ones(2)}, directory / name)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        for url in (server.url("my dir"), server.url("my dir/"), server.url("my dir/model.safetensors.index.json")):
            assert safetensors_torch.load_sharded(url)["w"].tolist() == [1, 1]
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"w": "..%2Fsecret.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="lists this shard"):
        safetensors_torch.load_sharded(server.url("my dir"))


def test_a_url_signed_for_get_is_read_without_head(server: ObjectServer) -> None:
    server.signature = "secret-signature"
    assert same(safetensors_torch.load_file(server.url()), TENSORS)
    assert all("?X-Amz-Signature=secret-signature" in request.target for request in server.requests)
    server.signature = "another-signature"
    url = server.url().replace("another", "secret")
    result, shown = outcome(safetensors_torch.load_file, url)
    assert result is PermissionError and "secret-signature" not in shown


def test_a_user_in_the_url_is_passed_on(server: ObjectServer) -> None:
    server.authorization = "Basic dXNlcjpzZWNyZXQtcGFzc3dvcmQ="
    url = server.url().replace("//", "//user:secret-password@")
    assert same(safetensors_torch.load_file(url), TENSORS)
    assert outcome(safetensors_torch.load_file, server.url())[0] is PermissionError
    server.authorization = "Basic another"
    result, shown = outcome(safetensors_torch.load_file, url)
    assert result is PermissionError and "secret-password" not in shown and server.url() in shown


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.1:1/", "s3://bucket", "s3://bucket/"])
def test_a_url_without_a_path_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=f"{url}.* has no path; name a file"):
        safetensors_torch.load_file(url)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\x08" + bytes(7)])
def test_files_that_are_too_short(content: bytes, server: ObjectServer, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(content)
    server.directory = tmp_path
    with pytest.raises(SafetensorError, match=server.url("short")):
        safetensors_torch.load_file(server.url("short"))


class FaultyFileSystem(MemoryFileSystem):
    """fsspec's memory, with the errors of other filesystems in the next reads."""

    protocol = "faulty"
    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = [""]
    # An exception that is kept keeps the frames that it passed through, and their files.
    faults: list[Callable[[], Exception] | int] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("faulty://", "memory://", 1))
        return stripped

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        fault = self.faults.pop(0) if self.faults and start else None
        if callable(fault):
            raise fault()
        content: bytes = super().cat_file(path, start=start, end=end, **options)
        return content if fault is None else content[:fault]


def _denied() -> Exception:
    return PermissionError("denied s3://user:secret-password@host/x?X=secret-signature")


FSSPEC_CASES: dict[str, tuple[list[Callable[[], Exception] | int], type[Exception] | None]] = {
    "connection": ([ConnectionResetError, BrokenPipeError], None),
    "time": ([TimeoutError, fsspec.exceptions.FSTimeoutError], None),
    "short": ([5, 0], None),
    "denied": ([_denied] * 16, PermissionError),
    "missing": ([FileNotFoundError] * 16, FileNotFoundError),
    "other": ([ValueError] * 16, OSError),
}


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("case", FSSPEC_CASES)
def test_faults_of_fsspec(
    case: str, function: str, directory: Path, expected: dict[str, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store_fsspec, "_FIRST_DELAY", 0.01)
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    faults, error = FSSPEC_CASES[case]
    monkeypatch.setattr(FaultyFileSystem, "faults", [*faults])
    filesystem = fsspec.filesystem("faulty")
    filesystem.pipe("/model.safetensors", (directory / "model.safetensors").read_bytes())
    result, shown = outcome(CALLS[function], "faulty://model.safetensors")
    if isinstance(result, dict):
        assert error is None and same(result, expected[function])
    else:
        assert error is not None and issubclass(result, error), shown
        assert "faulty://model.safetensors: " in shown and 'for tensor "' in shown
    assert not [secret for secret in SECRETS if secret in shown]
    check_nothing_is_open()
