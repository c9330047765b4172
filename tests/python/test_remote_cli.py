"""The shell command with URLs: what it reads, prints and imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import safetensors_torch
from fresh import run_python
from object_server import ObjectServer
from safetensors_torch import cli

TENSORS = {
    "large": torch.arange(2_500_000, dtype=torch.float32).view(4, 625_000),
    "matrix": torch.arange(24.0).view(4, 6).half(),
}
FILE, CHECKPOINT = "model.safetensors", "d/model.safetensors.index.json"
FIRST_READ = 1 << 20


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    safetensors_torch.save_file(TENSORS, FILE, {"key": "value"})
    safetensors_torch.save_sharded(TENSORS, "d", {"key": "value"}, max_shard_size=1000)
    return tmp_path


@pytest.fixture
def server(here: Path) -> Iterator[ObjectServer]:
    with ObjectServer(here) as server:
        yield server


def run(*arguments: str) -> int:
    return cli.main(arguments)


def test_ls_reads_the_header_alone(server: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", FILE) == 0
    local = capsys.readouterr().out
    assert run("ls", server.url()) == 0
    assert capsys.readouterr().out == local.replace(FILE, server.url(), 1)
    assert server.sizes() == [("GET", FIRST_READ)]


@pytest.mark.parametrize("name", [FILE, CHECKPOINT, "d", "d/"])
@pytest.mark.parametrize("option", [[], ["--sort", "size"], ["--match", "m*"], ["--json"]])
def test_ls(name: str, option: list[str], server: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", name, *option) == 0
    local = capsys.readouterr().out
    assert run("ls", server.url(name), *option) == 0
    remote = capsys.readouterr().out
    if option == ["--json"]:
        (expected,), (found,) = json.loads(local), json.loads(remote)
        assert found == {**expected, "path": server.url(name)}
    else:
        # The size of a file without its header is not known, nor asked for, if there are several.
        ours, theirs = ([line for line in text.splitlines()[1:]] for text in (local, remote))
        assert theirs == ours
        assert remote.startswith(server.url(name).rstrip("/") if name != FILE else server.url(name))


def test_a_query_is_not_shown(server: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.signature = "secret-signature"
    assert run("ls", server.url()) == 0 and run("ls", server.url(), "--json") == 0
    assert run("ls", server.url("none")) == 2 and run("ls", server.url(), "--match", "none") == 1
    assert run("verify", server.url()) == 2
    output = capsys.readouterr()
    assert "large" in output.out and "secret" not in output.out + output.err.partition("fetch it: ")[0]


def test_a_missing_file_is_one_line(server: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", server.url("none.safetensors")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ls: {server.url('none.safetensors')}: ") and error.count("\n") == 1


def test_several(server: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", FILE, server.url(), "memory://none") == 2
    assert "memory://none: " in capsys.readouterr().err


CONVERSIONS = (["out.safetensors"], ["out", "--max-shard-size", "1000"], ["out.safetensors", "--dtype", "fp16"])


@pytest.mark.parametrize("name", [FILE, CHECKPOINT, "d"])
@pytest.mark.parametrize("target", CONVERSIONS)
def test_convert(name: str, target: list[str], server: ObjectServer, here: Path) -> None:
    written = []
    for source in (name, server.url(name)):
        assert run("convert", source, *target, "--force", "--quiet") == 0
        out = here / target[0]
        paths = sorted(out.iterdir()) if out.is_dir() else [out]
        written.append({path.name: path.read_bytes() for path in paths})
    assert written[0] == written[1]


def test_convert_from_a_bucket(bucket: str, here: Path) -> None:
    safetensors_torch.save_sharded(TENSORS, f"{bucket}/d", max_shard_size=1000)
    assert run("convert", f"{bucket}/d", "out.safetensors", "--quiet") == 0
    assert safetensors_torch.load_file("out.safetensors").keys() == TENSORS.keys()


def test_diff(server: ObjectServer, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors_torch.save_file({**TENSORS, "matrix": TENSORS["matrix"] + 1}, "other.safetensors", {"key": "value"})
    assert run("diff", FILE, server.url(), "-q") == 0
    assert run("diff", server.url("d"), server.url(), "--no-values") == 1  # the metadata
    capsys.readouterr()
    assert run("diff", server.url(), "other.safetensors", "-q") == 1
    remote = capsys.readouterr().out
    assert run("diff", FILE, "other.safetensors", "-q") == 1
    assert remote == capsys.readouterr().out and "matrix" in remote


LOCAL_ONLY = (
    ["verify", "URL"],
    ["explain", "URL"],
    ["extract", "URL", "out.safetensors", "large"],
    ["rename", "URL", "out.safetensors", "s/a/b/"],
    ["metadata", "set", "URL", "key=other"],
    ["metadata", "remove", "URL", "key"],
)


@pytest.mark.parametrize("arguments", LOCAL_ONLY, ids=lambda arguments: " ".join(arguments[:2]))
def test_commands_for_local_files(
    arguments: list[str], server: ObjectServer, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.iterdir())
    assert run(*[server.url() if word == "URL" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{server.url()}: " in error, error
    assert "local files" in error and f"safetensors-torch convert {server.url()} model.safetensors" in error
    assert sorted(here.iterdir()) == before and server.requests == []


@pytest.mark.parametrize("target", ["s3://bucket/out.safetensors", "s3://bucket/out"])
def test_targets_are_local(target: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.iterdir())
    for command in (["convert", FILE, target], ["extract", FILE, target, "large"], ["rename", FILE, target, "s/a/b/"]):
        assert run(*command) == 2
        assert target.rpartition("/")[0] in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


def test_metadata_get(server: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("metadata", "get", server.url(), "key") == 0
    assert capsys.readouterr().out == "value\n"


def imported(*arguments: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """Runs the shell command, and returns the modules that it has imported."""
    command = [sys.executable, "-X", "importtime", "-m", "safetensors_torch", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}, ended


CLIENTS = {"obstore", "fsspec", "huggingface_hub", "torch"}


def test_imports(server: ObjectServer) -> None:
    for path, expected in ((FILE, set()), (server.url(), {"obstore"}), (server.url("d"), {"obstore"})):
        modules, ended = imported("ls", path)
        assert ended.returncode == 0 and "large" in ended.stdout, ended.stderr
        assert modules & CLIENTS == expected, path


def test_a_missing_client_is_one_line(here: Path) -> None:
    ended = run_python(
        """
        import sys
        sys.modules["obstore.store"] = sys.modules["huggingface_hub"] = None
        from safetensors_torch import cli
        for url, extra in (("s3://bucket/x", "remote"), ("hf://org/model/x", "hf"), ("hf://org/model", "hf")):
            assert cli.main(["ls", url]) == 2
        """
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.splitlines()
    assert [line.partition("pip install ")[2] for line in lines] == [
        "safetensors-torch[remote])",
        "safetensors-torch[hf])",
        "safetensors-torch[hf])",
    ]
