"""URLs: files on a server of the test's own, and in a filesystem of fsspec, with the faults that both have."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import safetensors_torch
from fresh import run_python
from object_server import CUT, ObjectServer
from safetensors_torch import _remote, _store_fsspec, _stores
from safetensors_torch.distributed import weights_iterator

TENSORS = {
    "large": torch.arange(5_000_000, dtype=torch.float32).view(5, 1_000_000),
    "matrix": torch.arange(24.0).view(4, 6).half(),
    "empty": torch.zeros(0, 3),
}
FIRST_READ, REQUEST = 1 << 20, 8 << 20


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectServer]:
    safetensors_torch.save_file(TENSORS, tmp_path / "model.safetensors", {"key": "value"})
    with ObjectServer(tmp_path) as server:
        yield server


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    """The URL of the file in fsspec's memory."""
    safetensors_torch.save_file(TENSORS, tmp_path / "model.safetensors", {"key": "value"})
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    yield "memory://bucket/model.safetensors"
    filesystem.rm("/bucket", recursive=True)


@pytest.fixture(params=["server", "memory"])
def url(request: pytest.FixtureRequest) -> str:
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, str) else found.url()


def test_the_functions_that_read_files_take_urls(url: str) -> None:
    assert same(safetensors_torch.load_file(url), TENSORS)
    assert same(safetensors_torch.load_file(url, backend="pread", names=["m*"]), {"matrix": TENSORS["matrix"]})
    half = safetensors_torch.load_file(url, dtype="bf16")
    assert half["large"].dtype == torch.bfloat16 and torch.equal(half["large"], TENSORS["large"].bfloat16())
    progress: list[tuple[int, int]] = []
    safetensors_torch.load_file(url, progress=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (20_000_048, 20_000_048)
    with safetensors_torch.safe_open(url, framework="pt") as file:
        assert sorted(file.keys()) == sorted(TENSORS) and file.metadata() == {"key": "value"}
        assert torch.equal(file.get_tensor("large"), TENSORS["large"])
        assert torch.equal(file.get_slice("large")[1:3, 7:1000], TENSORS["large"][1:3, 7:1000])
        assert torch.equal(file.get_slice("large")[:, ::250_000], TENSORS["large"][:, ::250_000])
        assert same(dict(file.prefetch(dict.fromkeys(file.keys()))), TENSORS)
        again = pickle.loads(pickle.dumps(file))
    with again:
        assert torch.equal(again.get_tensor("matrix"), TENSORS["matrix"])
    assert same(dict(safetensors_torch.iterate([url])), TENSORS)
    assert same(dict(weights_iterator([url])), TENSORS)
    assert _remote._open == {}, "closed files keep no client"


def test_only_what_is_needed_is_read(server: ObjectServer) -> None:
    with safetensors_torch.safe_open(server.url(), framework="pt") as file:
        assert [nbytes for method, nbytes in server.sizes() if method == "GET"] == [FIRST_READ]
        del server.requests[:]
        file.get_tensor("matrix")
        # It is in the first mebibyte, which nobody keeps.
        assert server.sizes() == [("GET", 48)]
        file.get_slice("large")[2]
        assert sum(nbytes for _, nbytes in server.sizes()[1:]) == 4_000_000
        del server.requests[:]
        file.get_tensor("large")
        assert sum(nbytes for _, nbytes in server.sizes()) == 20_000_000
        assert max(nbytes for _, nbytes in server.sizes()) <= REQUEST


def test_passing_faults_pass(server: ObjectServer) -> None:
    with safetensors_torch.safe_open(server.url(), framework="pt") as file:
        for fault in (503, 500, CUT):
            server.faults = [fault, fault]
            assert torch.equal(file.get_tensor("large"), TENSORS["large"]), fault
            assert server.faults == []


def test_other_faults_are_errors_that_name_the_url(server: ObjectServer) -> None:
    url = server.url()
    with pytest.raises(FileNotFoundError, match=server.url("none")):
        safetensors_torch.load_file(server.url("none"))
    (server.directory / "text.safetensors").write_text("<html>not found</html>")
    with pytest.raises(safetensors_torch.SafetensorError, match=server.url("text.safetensors")):
        safetensors_torch.load_file(server.url("text.safetensors"))
    with safetensors_torch.safe_open(url, framework="pt") as file:
        server.faults = [403]
        with pytest.raises(PermissionError, match=f"{url}: .*for tensor 'large'".replace("'", '"')):
            file.get_tensor("large")
        assert torch.equal(file.get_tensor("matrix"), TENSORS["matrix"])
        server.etag = '"two"'
        with pytest.raises(safetensors_torch.SafetensorError, match=f"{url}: the object was replaced while"):
            file.get_tensor("large")


def test_a_changed_file_of_fsspec_is_an_error(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store_fsspec, "_IDENTITY_SECONDS", 0.0)
    filesystem = fsspec.filesystem("memory")
    with safetensors_torch.safe_open(memory, framework="pt") as file:
        filesystem.pipe("/bucket/model.safetensors", bytes(len(filesystem.cat("/bucket/model.safetensors"))))
        with pytest.raises(safetensors_torch.SafetensorError, match=f"{memory}: the source was replaced while"):
            file.get_tensor("large")
    with pytest.raises(FileNotFoundError, match="memory://bucket/none"):
        safetensors_torch.load_file("memory://bucket/none")


def test_a_missing_client_is_an_import_error_that_names_the_extra() -> None:
    run_python(
        """
        import sys
        sys.modules["obstore.store"] = sys.modules["huggingface_hub"] = None
        import safetensors_torch
        for url, extra in (("s3://bucket/x", "remote"), ("hf://org/model/x", "hf")):
            try:
                safetensors_torch.load_file(url)
            except ImportError as error:
                assert f"safetensors-torch[{extra}]" in str(error) and str(error).startswith(url), error
            else:
                raise AssertionError(url)
        """
    )


def test_messages_have_no_secrets(server: ObjectServer) -> None:
    assert _stores.title_of_url("https://user:secret@host/path?X-Signature=secret") == "https://host/path"
    text = "GET https://user:secret@host/x?X-Signature=secret failed"
    assert _stores.text_of(ConnectionError(text)) == "GET https://host/x failed"
    assert _stores.text_of(RuntimeError(text)) == "RuntimeError: GET https://host/x failed"
    with pytest.raises(ValueError, match="no-such://host/x: no client reads such URLs"):
        safetensors_torch.load_file("no-such://user:secret@host/x")


def test_import_does_not_import_the_clients() -> None:
    run_python(
        """
        import sys
        import safetensors_torch
        assert not {"obstore", "huggingface_hub", "safetensors_torch._remote"} & sys.modules.keys()
        """
    )


def test_a_local_file_may_look_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("s3:/bucket")
    safetensors_torch.save_file({"w": torch.ones(2)}, "s3://bucket/x")
    assert safetensors_torch.load_file("s3://bucket/x")["w"].tolist() == [1, 1]


def test_a_process_may_end_while_it_reads_ahead(tmp_path: Path) -> None:
    safetensors_torch.save_file({f"t{number}": torch.ones(3_000_000) for number in range(6)}, tmp_path / "m")
    program = f"""
import sys, time
import fsspec, safetensors_torch
from fsspec.implementations.memory import MemoryFileSystem

read = MemoryFileSystem.cat_file
def slowly(*args, **kwargs):
    time.sleep(0.05)
    return read(*args, **kwargs)
MemoryFileSystem.cat_file = slowly
fsspec.filesystem("memory").pipe("/m", open({str(tmp_path / "m")!r}, "rb").read())
tensors = safetensors_torch.iterate("memory://m", buffer_bytes="1GB")
next(tensors)
sys.exit(3)
"""
    # Not in a fork, which ends without its interpreter.
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3, ended.stderr


def test_many_files_are_opened_at_once(tmp_path: Path) -> None:
    """By threads that Python has not started, to which the identities of the files are returned."""
    state = {f"w{number}": torch.full((1_000_000,), float(number)) for number in range(16)}
    safetensors_torch.save_sharded(state, tmp_path, max_shard_size="4MB")
    for _ in range(5):
        loaded = safetensors_torch.load_sharded(str(tmp_path), filesystem=fsspec.filesystem("file"))
        assert same(loaded, state)


def test_a_forked_process_gets_an_error(server: ObjectServer) -> None:
    """obstore would wait forever."""
    run_python(
        f"""
        import os, signal, sys
        import safetensors_torch
        url = {server.url()!r}
        with safetensors_torch.safe_open(url) as file:
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                for use in (lambda: file.get_tensor("large"), lambda: safetensors_torch.load_file(url)):
                    try:
                        use()
                    except OSError as error:
                        assert "forked after URLs were used" in str(error) and url in str(error), error
                    else:
                        os._exit(2)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert file.get_tensor("matrix").shape == (4, 6)
        """
    )


def test_a_fork_during_a_save_does_not_delay_it(tmp_path: Path) -> None:
    """The child has both ends of the pipe."""
    run_python(
        f"""
        import os, signal, time
        import fsspec, torch
        import safetensors_torch
        children = []
        def progress(done, total):
            if not children:
                children.append(os.fork())
                if children[0] == 0:
                    time.sleep(30)
                    os._exit(0)
        start = time.monotonic()
        state = {{"w": torch.ones(20_000_000)}}
        safetensors_torch.save_file(
            state, {str(tmp_path / "x")!r}, progress=progress, filesystem=fsspec.filesystem("file")
        )
        os.kill(children[0], signal.SIGKILL)
        assert time.monotonic() - start < 15
        assert torch.equal(safetensors_torch.load_file({str(tmp_path / "x")!r})["w"], state["w"])
        """
    )


def test_a_replaced_checkpoint_of_fsspec_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = ({"a": torch.full((400_000,), value), "b": torch.full((400_000,), value)} for value in (0.0, 1.0))
    filesystem = fsspec.filesystem("memory")
    safetensors_torch.save_sharded(old, "/fork/llm", max_shard_size="2MB", filesystem=filesystem)
    saves, cat_file = [1], type(filesystem).cat_file

    def replace(self: Any, path: str, **options: Any) -> bytes:
        data = cat_file(self, path, **options)
        if "00001-of" in path and saves:
            saves.pop()
            safetensors_torch.save_sharded(new, "/fork/llm", max_shard_size="2MB", filesystem=filesystem)
        return data

    monkeypatch.setattr(type(filesystem), "cat_file", replace)
    assert same(safetensors_torch.load_sharded("/fork/llm", filesystem=filesystem), new)
    filesystem.rm("/fork", recursive=True)


def test_an_index_does_not_lead_out_of_a_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    safetensors_torch.save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    for name in (f"file://{tmp_path}/secret.safetensors", f"local://{tmp_path}/secret.safetensors", "~/x.safetensors"):
        Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        for path in ("model.safetensors.index.json", ""):
            with pytest.raises((OSError, safetensors_torch.SafetensorError)):
                safetensors_torch.load_sharded(path, filesystem=fsspec.filesystem("file"))


def test_directories_are_refused_as_files_to_save() -> None:
    for path in ("", "x/"):
        with pytest.raises(IsADirectoryError, match="name a file in it"):
            safetensors_torch.save_file({"w": torch.ones(2)}, path, filesystem=fsspec.filesystem("memory"))
