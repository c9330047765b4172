"""The shell command: what each of its commands prints, its status, and that the examples in its help work."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import from_url

from safetensors_torch import (
    SafetensorError,
    _c_library,
    cli,
    load_file,
    load_sharded,
    safe_open,
    save_file,
    save_sharded,
)
from safetensors_torch._headers import read_headers
from safetensors_torch._sharded import open_checkpoint
from safetensors_torch.cli import metadata, values


def state() -> dict[str, torch.Tensor]:
    return {
        "layer.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
        "layer.bias": torch.ones(3, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Creates the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    save_file(state(), "model.safetensors", {"format": "pt"})
    nearly = {**state(), "layer.weight": state()["layer.weight"] * (1 + 1e-4)}
    save_file(nearly, "other.safetensors", {"format": "pt"})
    save_sharded(state(), "checkpoint", max_shard_size=50)
    torch.save(state(), "pytorch_model.bin")
    torch.save({"model": {"state_dict": {**state(), "epoch": 3}}}, "trained.ckpt")
    os.makedirs("step-1000/sharded")
    for rank in range(2):  # the rows of two processes
        positions = {"rows": {"saved_offsets": [rank, 0]}}
        saved = {"DCP_SHARDING_INFO": json.dumps(positions), "DCP_VERSION": "1.0"}
        file = f"step-1000/sharded/shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file({"rows": torch.full((1, 3), float(rank))}, file, saved)
    return tmp_path


def run(*arguments: str) -> int:
    return cli.main(arguments)


def json_of(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def helps() -> dict[str, str]:
    """Returns the help of each command."""
    (commands,) = (action.choices for action in cli.parser()._actions if isinstance(action.choices, dict))
    return {name: command.format_help() for name, command in commands.items()}


@pytest.mark.parametrize("command", helps())
def test_the_examples_in_the_help_work(
    here: Path, command: str, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    obstore.put(from_url(bucket), "model.safetensors", Path("model.safetensors"))
    _, found, text = helps()[command].partition("\nexamples:\n")
    assert found and text.strip(), "a command without examples"
    for example in text.splitlines():
        words = shlex.split(example.replace("s3://bucket/", f"{bucket}/"))
        assert words[:2] == ["safetensors-torch", command]
        assert run(*words[1:]) <= (command == "diff"), example
        captured = capsys.readouterr()
        assert captured.out and not captured.err, example
        if "--json" in words:
            json.loads(captured.out)


def test_the_examples_show_each_action_of_metadata() -> None:
    for action in metadata.ACTIONS:
        assert f"safetensors-torch metadata {action} " in metadata.EXAMPLES


def script() -> list[str]:
    """Returns the words that run the console script."""
    (entry,) = entry_points(group="console_scripts", name="safetensors-torch")
    return [sys.executable, "-c", f"import sys; from {entry.module} import {entry.attr}; sys.exit({entry.attr}())"]


@pytest.mark.parametrize("command", [script(), [sys.executable, "-m", "safetensors_torch"]], ids=["script", "module"])
def test_as_a_process(command: list[str], here: Path) -> None:
    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    assert process("ls", "model.safetensors").returncode == 0
    assert process("--version").stdout == f"safetensors-torch {version('safetensors-torch')}\n"
    Path("one.safetensors").touch()
    gone = process("ls", "gone.safetensors")
    assert (gone.returncode, gone.stdout) == (2, "")
    assert gone.stderr == "ls: No such file or directory: gone.safetensors; did you mean one.safetensors?\n"
    assert process("guess").returncode == 2
    size = os.path.getsize("model.safetensors")
    # A reader that closes the pipe after the first line is not an error.
    piped = f"{shlex.join(command)} ls {'model.safetensors ' * 3000} | head -n 1"
    closed = subprocess.run(["bash", "-o", "pipefail", "-c", piped], capture_output=True, text=True, check=False)
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, f"model.safetensors: {size} B\n", "")


WITHOUT_TORCH = {
    "--help": 0,
    "convert --help": 0,
    "": 2,
    "guess": 2,
    "ls --sort guess model.safetensors": 2,
    "convert model.safetensors --dtype guess": 2,
    "ls model.safetensors checkpoint": 0,
    "ls checkpoint --json": 0,
    "ls gone.safetensors": 2,
    "verify model.safetensors checkpoint": 0,
    "diff model.safetensors other.safetensors --no-values": 0,
    "diff model.safetensors changed.safetensors --no-values": 1,
    "extract checkpoint part.safetensors layer.*": 0,
    "rename model.safetensors renamed.safetensors s/layer/h/": 0,
    "metadata set renamed.safetensors epoch=3": 0,
    "metadata get renamed.safetensors": 0,
}


def test_commands_without_tensors_import_no_torch(here: Path) -> None:
    save_file({"new": torch.ones(1)}, "changed.safetensors")
    Path("site", "torch").mkdir(parents=True)
    Path("site", "torch", "__init__.py").write_text("raise RuntimeError('torch is imported')\n")
    environment = {**os.environ, "PYTHONPATH": "site", "CXX": "/nonexistent/c++"}

    module = [sys.executable, "-m", "safetensors_torch"]

    def process(line: str, command: list[str] = module) -> subprocess.CompletedProcess[str]:
        words = [*command, *shlex.split(line)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    for line, status in WITHOUT_TORCH.items():
        done = process(line)
        assert done.returncode == status, (line, done)
        assert "Traceback" not in done.stderr and "torch is imported" not in done.stderr, (line, done)
    for command in ([sys.executable, "-msafetensors_torch"], script()):
        assert process("ls model.safetensors", command).returncode == 0
    for line in ("diff model.safetensors other.safetensors", "convert model.safetensors new.safetensors"):
        assert "torch is imported" in process(line).stderr, line


def test_headers_equal_those_of_the_operators(here: Path) -> None:
    """The commands read headers through the core's C library."""
    save_file(
        {"s": torch.tensor(1.0), "e": torch.zeros(0, 3), "\u00fc": torch.ones(2, 3)},
        "odd.safetensors",
        {"k": "", "\u00e9": "\u4e2d"},
    )
    save_file({}, "none.safetensors")
    save_file({}, "empty.safetensors", {})
    for path in ("model.safetensors", "checkpoint", "odd.safetensors", "none.safetensors", "empty.safetensors"):
        headers, native = read_headers(path), open_checkpoint(path, "mmap")
        assert headers.files == list(native.shards())
        assert headers.metadata == native.metadata()
        assert [tensor.name for tensor in headers.tensors] == list(native.offset_keys())
        for tensor in headers.tensors:
            begin, end = native.byte_range(tensor.name)
            assert (tensor.begin, tensor.nbytes) == (begin, end - begin)
            assert (tensor.dtype, tensor.shape) == (native.dtype(tensor.name), list(native.shape(tensor.name)))
            assert tensor.file == native.shard_of(tensor.name)
    Path("damaged.safetensors").write_bytes(b"123")
    Path("directory.safetensors").mkdir()
    for path in ("damaged.safetensors", "gone.safetensors", "directory.safetensors/x", "directory.safetensors"):
        with pytest.raises((SafetensorError, OSError)) as theirs:
            open_checkpoint(path, "mmap")
        with pytest.raises(theirs.type, match=f"^{re.escape(str(theirs.value))}$") as ours:
            read_headers(path)
        assert getattr(ours.value, "errno", None) == getattr(theirs.value, "errno", None)


def test_a_c_library_that_does_not_load_is_reported(here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_c_library, "LIBRARY", here / "gone.so")
    _c_library.c_library.cache_clear()
    try:
        assert run("ls", "model.safetensors") == 2
    finally:
        _c_library.c_library.cache_clear()
    assert "ls: the package's C library does not load: " in capsys.readouterr().err


def test_ls(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", "model.safetensors") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"model.safetensors: {os.path.getsize('model.safetensors')} B",
        "metadata: format = pt",
        "BF16  [3]      6 B  layer.bias",
        "F32   [3, 4]  48 B  layer.weight",
        "I64   []       8 B  steps",
        "total: 3 tensors, 16 parameters, 62 B",
        "dtype  tensors  parameters  size  share",
        "F32          1          12  48 B  77.4%",
        "I64          1           1   8 B  12.9%",
        "BF16         1           3   6 B   9.7%",
    ]
    name = "model-00001-of-00002.safetensors"
    assert run("ls", "checkpoint", "--match", "*.weight") == 0
    assert capsys.readouterr().out.splitlines()[2:4] == [f"{name}:", "F32  [3, 4]  48 B  layer.weight"]
    assert run("ls", "checkpoint", "--sort", "size") == 0
    assert f"F32   [3, 4]  48 B  layer.weight  {name}" in capsys.readouterr().out.splitlines()
    # One of the paths has a match.
    save_file({"new": torch.ones(1)}, "new.safetensors")
    assert run("ls", "model.safetensors", "new.safetensors", "--match", "new") == 0
    assert capsys.readouterr().out.startswith("new.safetensors: ")
    assert run("ls", "checkpoint", "--json", "--sort", "name") == 0
    (listed,) = json_of(capsys)
    assert [entry["name"] for entry in listed["tensors"]] == ["layer.weight", "layer.bias", "steps"]
    assert (listed["count"], listed["parameters"], listed["nbytes"]) == (3, 16, 62)
    assert listed["metadata"] == {"format": "pt"}
    entry = listed["tensors"][0]
    assert (entry["dtype"], entry["shape"], entry["nbytes"], entry["file"]) == ("F32", [3, 4], 48, name)
    data = Path("checkpoint", name).read_bytes()[entry["begin"] : entry["begin"] + 48]
    assert data == state()["layer.weight"].numpy().tobytes()


def test_ls_sorts_numbers_by_value(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """int() refuses more than 4300 digits."""
    names = ["a", "a.1", "a.1.b", "a.02", "a.2", "a.10", f"a.{'9' * 5000}", "a.b", "b1"]
    save_file({name: torch.ones(1) for name in names}, "numbers.safetensors")
    assert run("ls", "numbers.safetensors", "--json") == 0
    assert [entry["name"] for entry in json_of(capsys)[0]["tensors"]] == names


def test_ls_shortens_long_values(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({}, "long.safetensors", {"k": "x" * 5000})
    assert run("ls", "long.safetensors") == 0
    assert f"metadata: k = {'x' * 100}... (5,000 characters)\n" in capsys.readouterr().out


def test_verify_finds_what_is_wrong(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = bytearray(Path("model.safetensors").read_bytes())
    Path("short.safetensors").write_bytes(damaged[:-1])
    assert run("verify", "model.safetensors", "short.safetensors", "--json") == 1
    results = {result["path"]: result for result in json_of(capsys)}
    assert results["model.safetensors"]["ok"]
    assert "short.safetensors" in results["short.safetensors"]["fault"]
    Path("checkpoint", "model-00002-of-00002.safetensors").unlink()
    assert run("verify", "checkpoint") == 1
    assert capsys.readouterr().out.startswith("FAILED  No such file or directory: checkpoint/model-00002")


@pytest.mark.parametrize("gone", ["gone.safetensors", "gone/model.safetensors.index.json", "nowhere/"])
def test_verify_of_a_missing_path_fails(gone: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", gone) == 2
    assert f"FAILED  No such file or directory: {gone}" in capsys.readouterr().out
    Path("short.safetensors").write_bytes(b"short")
    assert run("verify", "model.safetensors", gone, "short.safetensors", "--json") == 2
    assert [result["ok"] for result in json_of(capsys)] == [True, False, False]


def test_checksums(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "checkpoint", "model.safetensors", "--write-checksums", "checkpoint/SHA256SUMS") == 0
    lines = Path("checkpoint/SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256(Path("model.safetensors").read_bytes()).hexdigest()
    assert lines[-1] == f"{digest}  ../model.safetensors" and len(lines) == 3
    check = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd="checkpoint", capture_output=True, check=False)
    assert check.returncode == 0
    assert run("verify", "checkpoint", "--checksums", "checkpoint/SHA256SUMS") == 0
    # One bit of the data, which no header records.
    damaged = bytearray(Path("model.safetensors").read_bytes())
    damaged[-1] ^= 1
    Path("model.safetensors").write_bytes(damaged)
    capsys.readouterr()
    assert run("verify", "model.safetensors") == 0
    assert run("verify", "model.safetensors", "--checksums", "checkpoint/SHA256SUMS") == 1
    assert f"not {digest}: the data is damaged" in capsys.readouterr().out
    assert run("verify", "other.safetensors", "--checksums", "checkpoint/SHA256SUMS") == 1
    assert "the list of checksums lacks it" in capsys.readouterr().out
    Path("checkpoint/SHA256SUMS").write_text("not a checksum\n")
    assert run("verify", "model.safetensors", "--checksums", "checkpoint/SHA256SUMS") == 2
    assert "SHA256SUMS, line 1" in capsys.readouterr().err
    assert run("verify", "model.safetensors", "--checksums", "x", "--header-only") == 2


def test_diff(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", "model.safetensors", "other.safetensors") == 1
    assert capsys.readouterr().out == "values  layer.weight: 12 of 12 differ, by up to 0.000100017\n"
    changed = {**state(), "layer.bias": torch.ones(3), "new": torch.ones(1), "steps": torch.tensor(2**62 + 1)}
    del changed["layer.weight"]
    save_file(changed, "changed.safetensors", {"format": "pt", "k": "v"})
    assert run("diff", "model.safetensors", "changed.safetensors", "--json") == 1
    assert json_of(capsys) == {
        "equal": False,
        "compared": 2,
        "left_only": ["layer.weight"],
        "right_only": ["new"],
        "kinds": [{"name": "layer.bias", "left": "BF16 [3]", "right": "F32 [3]"}],
        "values": [{"name": "steps", "differing": 1, "elements": 1, "nan": 0, "max_difference": float(2**62 - 6)}],
        "metadata": [{"key": "k", "left": None, "right": "v"}],
    }
    # They differ by one, which a double cannot represent.
    save_file({**changed, "steps": torch.tensor(2**62)}, "one_less.safetensors", {"format": "pt", "k": "v"})
    assert run("diff", "changed.safetensors", "one_less.safetensors") == 1
    assert "steps: 1 of 1 differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("left", "right", "tolerance", "expected"),
    [
        (float("nan"), float("nan"), 0.0, None),
        (0.0, -0.0, 0.0, {"differing": 1, "elements": 2, "nan": 0, "max_difference": 0.0}),
        (0.0, -0.0, 1e-9, None),
        (1.0, 1.1, 0.2, None),
        (1.0, 2.0, 0.2, {"differing": 1, "elements": 2, "nan": 0, "max_difference": 1.0}),
        (1.0, float("inf"), 0.2, {"differing": 1, "elements": 2, "nan": 0, "max_difference": None}),
        (1.0, float("nan"), 0.2, {"differing": 1, "elements": 2, "nan": 1, "max_difference": None}),
    ],
)
def test_values(left: float, right: float, tolerance: float, expected: Any) -> None:
    pair = (torch.tensor([value, 5.0]) for value in (left, right))
    assert values.compare(*pair, 0.0, tolerance) == expected


def test_tensors_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_PIECE", 3)
    left, right = torch.zeros(10), torch.zeros(10)
    right[[0, 9]] = torch.tensor([1.0, 3.0])
    assert values.compare(left, right, 0.0, 0.0) == {"differing": 2, "elements": 10, "nan": 0, "max_difference": 3.0}
    for dtype in (torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8, torch.uint64):
        ours = torch.zeros(7, dtype=torch.float32).to(dtype)
        theirs = torch.tensor([0, 0, 0, 1, 0, 0, 0], dtype=torch.float32).to(dtype)
        expected = {"differing": 1, "elements": 7, "nan": 0, "max_difference": 1.0}
        assert values.compare(ours, theirs, 0.0, 0.0) == expected, dtype


def test_convert_what_torch_saved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    saved = {"optimizer": {"lr": 0.1}, "model": {"a": base, "tied": base, "bent": torch.arange(6).reshape(2, 3).t()}}
    torch.save(saved, "trained.pt")
    assert run("convert", "trained.pt", "a.safetensors") == 2
    assert "optimizer (dict of lr)" in capsys.readouterr().err
    assert run("convert", "trained.pt", "a.safetensors", "--key", "gone") == 2
    assert "no entry 'gone'" in capsys.readouterr().err
    assert run("convert", "trained.pt", "a.safetensors", "--key", "model", "--json") == 0
    result = {"files": ["a.safetensors"], "count": 2, "nbytes": 72, "skipped": [], "tied": {"tied": "a"}}
    assert json_of(capsys) == result
    loaded = load_file("a.safetensors")
    assert torch.equal(loaded["a"], base) and torch.equal(loaded["bent"], saved["model"]["bent"])
    with safe_open("a.safetensors") as file:
        assert file.metadata() == {"format": "pt", "tied": "a"}
    torch.save(saved["model"], "old.pt", _use_new_zipfile_serialization=False)
    assert run("convert", "old.pt", "old.safetensors") == 0
    torch.save(base, "one.pt")
    assert run("convert", "one.pt", "b.safetensors") == 2
    assert "holds Tensor" in capsys.readouterr().err


def test_convert_runs_no_code(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (Path("owned"),))

    torch.save({"a": torch.ones(1), "b": Evil()}, "evil.bin")
    assert run("convert", "evil.bin", "evil.safetensors") == 2
    assert not Path("owned").exists() and not Path("evil.safetensors").exists()
    assert "evil.bin holds more than tensors" in capsys.readouterr().err


def test_convert_divides_joins_and_casts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "model.safetensors", "parts", "--max-shard-size", "50B") == 0
    assert len(list(Path("parts").iterdir())) == 4
    assert run("convert", "parts", "joined.safetensors", "--dtype", "float16") == 0
    joined = load_file("joined.safetensors")
    assert joined["layer.weight"].dtype == joined["layer.bias"].dtype == torch.float16
    assert torch.equal(joined["layer.weight"], state()["layer.weight"].half()) and joined["steps"] == 7
    assert run("diff", "model.safetensors", "parts") == 0
    capsys.readouterr()
    # Only --force replaces an existing target.
    for target in ("joined.safetensors", "parts"):
        before = {path: path.read_bytes() for path in Path(".").rglob("*.safetensors")}
        assert run("convert", "other.safetensors", target) == 2
        assert f"{target} exists already" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path(".").rglob("*.safetensors")} == before
        assert run("convert", "other.safetensors", target, "--force") == 0
        assert torch.equal(load_sharded(target)["layer.weight"], load_file("other.safetensors")["layer.weight"])
    # The target is the source.
    assert run("convert", "parts", "parts", "--force", "--max-shard-size", "50") == 0
    assert run("diff", "other.safetensors", "parts") == 0
    assert run("convert", "model.safetensors", "x.safetensors", "--max-shard-size", "1GB") == 2
    assert run("convert", "model.safetensors", "x.safetensors", "--key", "k") == 2


def test_explain_says_how_files_would_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "model.safetensors", "checkpoint") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model.safetensors  ") and [line.split()[0] for line in lines[1:4]] == [
        "mmap",
        "pread",
        "device",
    ]
    assert "touched" in lines[1]
    assert run("explain", "checkpoint", "--json") == 0
    files = json_of(capsys)
    assert [Path(file["path"]).parent.name for file in files] == ["checkpoint"] * len(files) and len(files) > 1
    assert all(file["plans"].keys() == {"mmap", "pread", "device"} for file in files)
    assert all(file["nbytes"] == os.path.getsize(file["path"]) for file in files)
    assert run("explain", "none.safetensors") == 2
