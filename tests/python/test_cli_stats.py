"""``stats``: its table, its verdict, its JSON, its memory, and what it does about files that change while it reads."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fresh import run_python
from object_server import ObjectServer
from safetensors_torch import cli, save_file, save_sharded
from support import entry, pack

NAN, INF = math.nan, math.inf

STATE = {
    "layer.2.weight": torch.tensor([[1.0, -2.0], [0.0, 4.0]]),
    "layer.10.weight": torch.tensor([0.5, NAN, INF, -INF], dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(STATE, "model.safetensors")
    save_sharded(STATE, "checkpoint", max_shard_size=20)
    return tmp_path


@pytest.fixture
def server(here: Path) -> Iterator[ObjectServer]:
    with ObjectServer(here) as server:
        yield server


def run(*arguments: str) -> int:
    return cli.main(["stats", *arguments])


def json_of(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "safetensors_torch", "stats", *arguments]


def write_sparse(path: str, nbytes: int) -> None:
    """Writes a sparse file of zeros: only its header takes space on the disk."""
    header = {"w": entry("U8", [nbytes], 0, nbytes)}
    Path(path).write_bytes(pack(header))
    os.truncate(path, os.path.getsize(path) + nbytes)


def test_the_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model.safetensors") == 0
    assert capsys.readouterr().out.splitlines() == [
        "min  max  mean  std  zeros  NaN  Inf  dtype  name",
        "  -    -     -    -      0    0    0  F32    empty",
        " -2    4  0.75  2.5      1    0    0  F32    layer.2.weight",
        "0.5  0.5   0.5    -      0    1    2  BF16   layer.10.weight",
        "  7    7     7    -      0    0    0  I64    steps",
        "total: 4 tensors, 9 values, 32 B",
        "1 zero, 1 NaN, 2 Inf",
    ]


@pytest.mark.parametrize("path", ["model.safetensors", "checkpoint", "checkpoint/model.safetensors.index.json"])
def test_json(here: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, "--json") == 0
    found = json_of(capsys)
    assert (found["path"], found["finite"]) == (path, False)
    tensors = {tensor.pop("name"): tensor for tensor in found["tensors"]}
    if path == "model.safetensors":
        assert list(tensors) == ["empty", "layer.2.weight", "layer.10.weight", "steps"]
    weight = tensors["layer.2.weight"]
    assert weight.pop("std") == pytest.approx(STATE["layer.2.weight"].std().item())
    del weight["file"]
    values = {"count": 4, "zeros": 1, "nan": 0, "inf": 0, "min": -2.0, "max": 4.0, "mean": 0.75}
    assert weight == {"dtype": "F32", "shape": [2, 2], **values}
    assert (tensors["empty"]["count"], tensors["empty"]["mean"]) == (0, None)
    assert (tensors["layer.10.weight"]["nan"], tensors["layer.10.weight"]["inf"]) == (1, 2)


def test_names_and_globs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["checkpoint", "*.2.*", "steps", "--json"],
        ["checkpoint", "--json", "*.2.*", "steps"],
        ["--json", "checkpoint", "-q", "*.2.*", "steps"],
    ):
        assert run(*arguments) == 0
        assert {tensor["name"] for tensor in json_of(capsys)["tensors"]} == {"layer.2.weight", "steps"}
    assert run("checkpoint", "step") == 1
    assert "stats: checkpoint: no tensor matches 'step'; '*step*' matches 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run("checkpoint", "--jsn", "steps")
    assert ended.value.code == 2
    assert "unrecognized arguments: --jsn steps; did you mean --json?" in capsys.readouterr().err


def test_check(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model.safetensors", "--check") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "check: NaN or Inf in 1 tensor: layer.10.weight"
    assert run("model.safetensors", "--check", "--json") == 1
    assert json_of(capsys)["finite"] is False
    assert run("model.safetensors", "layer.2.weight", "--check") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "check: no NaN and no Inf"
    save_file({f"t{index}": torch.tensor([NAN]) for index in range(7)}, "bad.safetensors")
    assert run("bad.safetensors", "--check") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "check: NaN or Inf in 7 tensors: t0, t1, t2, t3, t4, ..."


def test_dtypes_without_defined_elements(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("f6.safetensors").write_bytes(pack({"a": entry("F6_E2M3", [4], 0, 3)}, b"abc"))
    assert run("f6.safetensors", "--check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["-"] * 7 + ["F6_E2M3", "a"]
    assert "without statistics: 1 tensor of F6_E2M3, whose elements the format does not define" in lines
    assert run("f6.safetensors", "--json") == 0
    (tensor,) = json_of(capsys)["tensors"]
    assert tensor["count"] is None and tensor["mean"] is None


def test_deviations_beyond_a_double_are_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.tensor([1e300, -1e300], dtype=torch.float64)}, "huge.safetensors")
    assert run("huge.safetensors", "--json") == 0
    (tensor,) = json_of(capsys)["tensors"]
    assert (tensor["mean"], tensor["std"], tensor["max"]) == (0, None, 1e300)


def test_names_that_control_a_terminal_are_escaped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a\x1b[2J\nb": torch.tensor([NAN])}, "hostile.safetensors")
    assert run("hostile.safetensors", "--check") == 1
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert output.count(r"a\x1b[2J\nb") == 2


def test_a_terminal_gets_a_table_that_fits(here: Path) -> None:
    save_file({"model.layers.0.self_attention.query_projection.weight": torch.tensor([1.5, NAN])}, "long.safetensors")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        environment.pop(name, None)
    done = subprocess.run(command("long.safetensors"), stdout=theirs, stdin=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    lines = os.read(ours, 1 << 16).decode().splitlines()
    os.close(ours)
    assert done.returncode == 0
    assert "\x1b[1;31m1\x1b[0m" in lines[1] or "\x1b[31;1m1\x1b[0m" in lines[1]
    assert "…" in lines[1] and lines[1].endswith("weight")


@pytest.mark.parametrize("path", ["model.safetensors", "checkpoint/"])
def test_urls(here: Path, server: ObjectServer, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path) == 0
    local = capsys.readouterr().out
    assert run(server.url(path)) == 0
    assert capsys.readouterr().out == local


def test_small_tensors_of_a_url_are_read_together(here: Path, server: ObjectServer) -> None:
    state = {f"t{index}": torch.full((30_000,), float(index)) for index in range(64)}
    save_file(state, "many.safetensors")
    assert run(server.url("many.safetensors")) == 0
    assert len(server.sizes()) <= 12, "a request for each tensor"


def test_many_small_tensors_take_little_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {f"layer.{index}.scale": entry("F32", [2], 8 * index, 8 * index + 8) for index in range(20_000)}
    Path("many.safetensors").write_bytes(pack(header, b"\0\0\x80\x3f\0\0\0\x40" * 20_000))
    began = time.perf_counter()
    assert run("many.safetensors", "--json") == 0
    assert time.perf_counter() - began < 5
    tensors = json_of(capsys)["tensors"]
    assert len(tensors) == 20_000 and all(tensor["mean"] == 1.5 for tensor in tensors)


@pytest.mark.parametrize("nbytes", [20_000, 64 << 20])
def test_a_file_that_became_shorter(here: Path, nbytes: int) -> None:
    write_sparse("large.safetensors", nbytes)
    program = """
        import os, sys
        from safetensors_torch import _statistics, cli

        original = _statistics._compute

        def compute(*arguments):
            os.truncate("large.safetensors", 4096)
            original(*arguments)

        _statistics._compute = compute
        sys.exit(cli.main(["stats", "large.safetensors"]))
    """
    done = run_python(program)
    assert done.returncode == 2, "a signal: the file was mapped"
    assert done.stderr.startswith("stats: ")
    assert "large.safetensors" in done.stderr and "became shorter" in done.stderr


def test_a_file_that_was_replaced_is_read_to_its_end(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors_torch import _statistics

    original = _statistics._compute

    def compute(*arguments: Any) -> None:
        save_file({"a": torch.tensor(1.0)}, "model.safetensors")
        original(*arguments)

    monkeypatch.setattr(_statistics, "_compute", compute)
    assert run("model.safetensors", "--json") == 0
    assert len(json_of(capsys)["tensors"]) == 4


def test_torch_is_not_imported(here: Path) -> None:
    program = (
        "import sys; from _safetensors_torch_start import shell_command; status = shell_command();"
        "sys.exit(3 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", program, "stats", "model.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.alone
def test_ctrl_c_ends_it_in_a_moment(here: Path) -> None:
    write_sparse("large.safetensors", 1 << 40)
    process = subprocess.Popen(
        command("large.safetensors"),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(1)
    assert process.poll() is None, "it ended before the interrupt"
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130, errors
    assert time.monotonic() - began < 2
    assert errors == b""


@pytest.mark.alone
def test_a_large_file_holds_little_memory(here: Path) -> None:
    write_sparse("large.safetensors", 2 << 30)
    program = (
        "import re, sys; from _safetensors_torch_start import shell_command; status = shell_command();"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program, "stats", "large.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) * 1024 < 100_000_000
