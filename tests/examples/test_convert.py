"""examples/cpp/convert: what it writes, what it refuses, and how much memory it takes.

Run: CONVERT=BUILD/convert python -m pytest tests/examples/test_convert.py
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CONVERT = os.environ["CONVERT"]
MEBIBYTE = 1 << 20
METADATA = {"format": "pt", "lm_head.weight": "wte.weight", "ключ": 'a "value"\n'}


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2019)
    return {
        "f64": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "f32": torch.randn(40, 10, generator=generator),
        "f16": torch.randn(200, generator=generator).half(),
        "bf16": torch.randn(2, 100, generator=generator).bfloat16(),
        "special": torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0]),
        "f8": torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "i64": torch.arange(7),
        "bool": torch.tensor(True),
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.safetensors"
    save_file(sample(), path, METADATA)
    return path


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([CONVERT, *map(str, arguments)], capture_output=True, text=True, check=False)


def convert(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def metadata(path: Path) -> dict[str, str] | None:
    with safe_open(path, "pt") as file:
        return file.metadata()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return bytes(tensor.reshape(-1).view(torch.uint8).tolist())

    return a.keys() == b.keys() and all(
        (a[name].dtype, a[name].shape, raw(a[name])) == (b[name].dtype, b[name].shape, raw(b[name])) for name in a
    )


def read_shards(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, found as its index tells."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: load_file(directory / name) for name in set(weight_map.values())}
    assert sorted(name for shard in shards.values() for name in shard) == sorted(weight_map)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def test_shards_hold_all_and_become_one_file_again(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    names = convert("shard", whole, directory, "--max-shard-size", "2KB").splitlines()
    files = sorted(path.name for path in directory.iterdir())
    assert sorted(names) == files
    shards = [directory / name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert same(read_shards(directory), sample())
    for shard in shards:
        assert metadata(shard) == METADATA
        assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= 2000

    for number, path in enumerate((directory, directory / "model.safetensors.index.json")):
        again = tmp_path / f"{number}.safetensors"
        assert convert("unshard", path, again) == ""
        assert same(load_file(again), sample())
        assert metadata(again) == METADATA


def test_a_sharded_checkpoint_is_divided_anew_in_its_place(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    convert("shard", whole, directory, "--max-shard-size", "500B")
    before = set(directory.iterdir())
    convert("shard", directory, directory, "--max-shard-size", "2KB")
    assert len(set(directory.iterdir())) < len(before)
    assert same(read_shards(directory), sample())


def test_what_fits_in_one_file_is_one_file(whole: Path, tmp_path: Path) -> None:
    assert convert("shard", whole, tmp_path / "directory") == "model.safetensors\n"
    assert same(load_file(tmp_path / "directory/model.safetensors"), sample())


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("source", ["whole", "sharded", "in its place"])
def test_cast_converts_what_has_a_wide_float(whole: Path, tmp_path: Path, dtype: str, source: str) -> None:
    out = tmp_path / "out.safetensors"
    if source == "sharded":
        convert("shard", whole, tmp_path / "sharded", "--max-shard-size", "2KB")
        convert("cast", tmp_path / "sharded", out, "--dtype", dtype)
    elif source == "whole":
        convert("cast", whole, out, "--dtype", dtype)
    else:
        convert("cast", whole, whole, "--dtype", dtype)
        out = whole
    wanted = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    expected = {
        name: tensor.to(wanted) if tensor.is_floating_point() and tensor.itemsize > 1 else tensor
        for name, tensor in sample().items()
    }
    assert same(load_file(out), expected)
    assert metadata(out) == METADATA


def test_cast_refuses_what_would_become_infinite(tmp_path: Path) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"large": torch.tensor([1.0, 65520.0])}, path)
    out.write_bytes(b"before")
    result = run("cast", path, out, "--dtype", "f16")
    assert (result.returncode, result.stdout) == (1, "")
    assert "tensor large " in result.stderr and "Half" in result.stderr
    assert out.read_bytes() == b"before"
    convert("cast", path, out, "--dtype", "bf16")


@pytest.mark.parametrize("command", [["shard"], ["unshard"], ["cast", "--dtype", "f16"]])
@pytest.mark.parametrize("content", ["missing", "cut short", "empty directory"])
def test_a_bad_input_leaves_the_output_alone(whole: Path, tmp_path: Path, command: list[str], content: str) -> None:
    directory, source = tmp_path / "out", tmp_path / "source"
    convert("shard", whole, directory, "--max-shard-size", "2KB")
    save_file({"x": torch.ones(2)}, directory / "file")
    before = {path: path.read_bytes() for path in directory.iterdir()}
    if content == "cut short":
        source.write_bytes(whole.read_bytes()[:-1])
    elif content == "empty directory":
        source.mkdir()
    result = run(*command, source, directory if command == ["shard"] else directory / "file")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("convert: ") and str(source) in result.stderr
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["shard", "a"],
        ["shard", "a", "b", "c"],
        ["merge", "a", "b"],
        ["cast", "a", "b"],
        ["cast", "a", "b", "--dtype", "i8"],
        ["cast", "a", "b", "--dtype", "f16", "--max-shard-size", "1GB"],
        ["unshard", "a", "b", "--dtype", "f16"],
        ["shard", "a", "b", "--wrong"],
        *(
            ["shard", "a", "b", "--max-shard-size", size]
            for size in ("", "0", "-1", "GB", "1TB", "1.5GB", "1 GB", "1gb")
        ),
        ["shard", "a", "b", "--max-shard-size", "9223372036854775807KB"],
        ["shard", "a", "b", "--max-shard-size", "9223372036854775808"],
    ],
)
def test_wrong_arguments_give_the_usage(arguments: list[str], tmp_path: Path) -> None:
    result = subprocess.run([CONVERT, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: convert shard IN DIRECTORY" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "count"), [("2MiB", 1), ("2097151", 2), ("2097152B", 1), ("2MB", 2), ("3MB", 1)])
def test_sizes_are_read_with_their_units(tmp_path: Path, size: str, count: int) -> None:
    path = tmp_path / "in.safetensors"
    save_file({"a": torch.zeros(MEBIBYTE, dtype=torch.int8), "b": torch.zeros(MEBIBYTE, dtype=torch.int8)}, path)
    convert("shard", path, tmp_path / "out", "--max-shard-size", size)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == count


def peak_of_own_memory(*arguments: object) -> int:
    """Bytes of memory that no file stands behind, looked at while the program runs."""
    peak = 0
    with subprocess.Popen([CONVERT, *map(str, arguments)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if "RssAnon" in line)])
            time.sleep(0.002)
    assert process.returncode == 0
    return peak


def test_memory_does_not_follow_the_tensors(tmp_path: Path) -> None:
    size, count = 64 * MEBIBYTE, 6
    header = {
        f"t{i}": {"dtype": "I8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i in range(count)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count * size)
    for arguments in (
        ("shard", path, tmp_path / "sharded", "--max-shard-size", size),
        ("unshard", tmp_path / "sharded", tmp_path / "again.safetensors"),
        ("cast", path, tmp_path / "cast.safetensors", "--dtype", "bf16"),
    ):
        peak = peak_of_own_memory(*arguments)
        print(f"{arguments[0]}: {peak / MEBIBYTE:.0f} MiB for {count * size // MEBIBYTE} MiB")
        assert 0 < peak < count * size / 2
