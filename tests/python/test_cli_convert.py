"""``convert`` of what torch.save wrote in several files, in entries of entries, and of what is not all tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safetensors_torch import cli, load_file, load_sharded, safe_open

INDEX = "pytorch_model.bin.index.json"


def run(*arguments: str) -> int:
    return cli.main(("convert", *arguments))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shards() -> list[dict[str, torch.Tensor]]:
    base = torch.arange(6.0).reshape(2, 3)
    return [
        {"a": base, "tied": base, "bent": torch.arange(6).reshape(2, 3).t()},
        {"z": torch.ones(4, dtype=torch.bfloat16), "b": torch.zeros(0), "steps": torch.tensor(7)},
    ]


def save_shards(directory: str, parts: list[dict], stem: str = "pytorch_model", zipped: bool = True) -> dict[str, str]:
    """Saves the files and their index. Returns the file of each tensor."""
    os.makedirs(directory, exist_ok=True)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05}-of-{len(parts):05}.bin"
        torch.save(part, os.path.join(directory, name), _use_new_zipfile_serialization=zipped)
        weight_map.update(dict.fromkeys(part, name))
    Path(directory, INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def check(found: dict[str, torch.Tensor]) -> None:
    expected = {name: tensor for part in shards() for name, tensor in part.items() if name != "tied"}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("source", ["old", f"old/{INDEX}"])
def test_an_index_and_its_files(here: Path, source: str, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    save_shards("old", shards(), zipped=zipped)
    assert run(source, "one.safetensors") == 0
    check(load_file("one.safetensors"))
    with safe_open("one.safetensors") as file:
        assert file.metadata() == {"format": "pt", "tied": "a"}
    assert run(source, "several", "--max-shard-size", "40", "--json") == 0
    result = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert [os.path.basename(name) for name in result["files"]] == sorted(os.listdir("several"))
    assert len(result["files"]) == 3 and result["count"] == 5
    check(load_sharded("several"))
    # The target is beside the source.
    assert run("old", "old") == 0
    check(load_sharded("old"))


def test_files_without_an_index(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_shards("old", shards())
    Path("old", INDEX).unlink()
    assert run("old", "a.safetensors") == 0
    check(load_file("a.safetensors"))
    Path("old", "pytorch_model-00001-of-00002.bin").unlink()
    assert run("old", "b.safetensors") == 2
    assert "holds 1 of 2 files: fetch the others" in capsys.readouterr().err


def test_which_file_of_a_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("d")
    torch.save({"a": torch.ones(1)}, "d/weights.pt")
    assert run("d", "a.safetensors") == 0 and load_file("a.safetensors").keys() == {"a"}
    torch.save({"b": torch.ones(1)}, "d/training_args.bin")
    assert run("d", "b.safetensors") == 2
    assert "several checkpoints: name one of training_args.bin, weights.pt" in capsys.readouterr().err
    torch.save({"c": torch.ones(1)}, "d/pytorch_model.bin")
    assert run("d", "c.safetensors") == 0 and load_file("c.safetensors").keys() == {"c"}
    # Safetensors files take precedence, and report their own errors.
    Path("d/model.safetensors").write_bytes(b"")
    assert run("d", "d.safetensors") == 2
    assert "model.safetensors" in capsys.readouterr().err
    os.mkdir("empty")
    assert run("empty", "e.safetensors") == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_an_index_that_does_not_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight_map = save_shards("old", shards())

    def refused(change: dict[str, str], *said: str, without: str = "") -> None:
        changed = {name: file for name, file in {**weight_map, **change}.items() if name != without}
        Path("old", INDEX).write_text(json.dumps({"weight_map": changed}))
        assert run("old", "a.safetensors") == 2
        error = capsys.readouterr().err
        assert all(text in error for text in said), error
        assert not os.path.exists("a.safetensors")

    first, second = sorted(set(weight_map.values()))
    refused({"gone": first}, "gone", first, "does not hold it")
    refused({"z": first}, "z", first)
    refused({"a": "../pytorch_model.bin"}, "'../pytorch_model.bin'", "do not trust")
    refused({"a": "/pytorch_model.bin"}, "do not trust")
    refused({"a": "pytorch_model-00003-of-00002.bin"}, "No such file", "00003-of-00002")
    refused({}, "steps", INDEX, "--skip", without="steps")
    assert run("old", "a.safetensors", "--skip") == 0
    assert f"skipped   steps (old/{second}: not in the index)" in capsys.readouterr().out
    assert "steps" not in load_file("a.safetensors") and "z" in load_file("a.safetensors")
    Path("old", INDEX).write_text("{}")
    assert run(f"old/{INDEX}", "b.safetensors") == 2
    assert "weight_map" in capsys.readouterr().err


def test_a_name_in_two_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_shards("old", [{"a": torch.ones(1)}, {"a": torch.ones(1)}])
    Path("old", INDEX).unlink()
    assert run("old", "a.safetensors") == 2
    assert "holds the tensor 'a', and so does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("state_dict", lambda state: {"state_dict": state}),
        ("model.state_dict", lambda state: {"model": {"state_dict": state, "name": "m"}, "epoch": 3}),
        ("model.state_dict", lambda state: {"model.state_dict": state, "model": {"state_dict": 5}}),
        ("a.b.c.d", lambda state: {"a": {"x": 1}, "a.b": {"c.d": state}}),
    ],
)
def test_an_entry_of_an_entry(here: Path, key: str, entry: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(entry({"w": torch.ones(2)}), "trained.ckpt")
    assert run("trained.ckpt", "a.safetensors", "--key", key) == 0
    assert load_file("a.safetensors")["w"].tolist() == [1, 1]
    assert run("trained.ckpt", "b.safetensors", "--key", key + ".gone") == 2
    assert f"no entry '{key}.gone': it has " in capsys.readouterr().err


def test_an_error_shows_what_is_in_the_entries(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"state_dict": {"w": torch.ones(2)}}, "epoch": 3}, "trained.ckpt")
    assert run("trained.ckpt", "a.safetensors") == 2
    error = capsys.readouterr().err
    assert "model (dict of state_dict), epoch (int)" in error and "--key" in error and "--skip" in error
    assert run("trained.ckpt", "a.safetensors", "--skip") == 2
    assert "holds no tensor" in capsys.readouterr().err


def test_skip_leaves_out_what_is_not_a_tensor(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(2), "epoch": 3, "config\x1b[31m": {"lr": 0.1}}, "trained.pt")
    assert run("trained.pt", "a.safetensors") == 2
    error = capsys.readouterr().err
    assert "epoch (int)" in error and "--skip" in error and not os.path.exists("a.safetensors")
    assert run("trained.pt", "a.safetensors", "--skip") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["skipped   epoch (int)", "skipped   config\\x1b[31m (dict)"]
    assert load_file("a.safetensors").keys() == {"w"}
    assert run("trained.pt", "b.safetensors", "--skip", "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == ["epoch (int)", "config\x1b[31m (dict)"]
    assert run("a.safetensors", "c.safetensors", "--skip") == 2
    assert "--skip" in capsys.readouterr().err
    torch.save({1: torch.ones(1), "1": torch.ones(1)}, "twice.pt")
    assert run("twice.pt", "d.safetensors") == 2
    assert "equal as text" in capsys.readouterr().err


def test_a_truncated_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(2000)}, "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:3000])
    assert run("cut.pt", "a.safetensors") == 2
    assert "cut.pt is damaged" in capsys.readouterr().err
    assert os.listdir() == ["whole.pt", "cut.pt"] or sorted(os.listdir()) == ["cut.pt", "whole.pt"]


PEAK = """
import resource, sys
from safetensors_torch import cli
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
import threading, time
peak, over = [0], threading.Event()
def watch():
    while not over.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
status = cli.main(sys.argv[1:])
over.set()
watcher.join()
print(status, peak[0] - before, file=sys.stderr)
"""


@pytest.mark.parametrize(("zipped", "target"), [(False, "one.safetensors"), (False, "several")])
def test_memory_is_that_of_a_few_tensors(here: Path, zipped: bool, target: str) -> None:
    """The source has sixteen files of 16 MiB in the format that cannot be mapped."""
    size = 16 << 20
    save_shards("old", [{f"{i}": torch.full((size // 4,), float(i))} for i in range(16)], zipped=zipped)
    more = ["--max-shard-size", "20MB"] if target == "several" else []
    command = [sys.executable, "-c", PEAK, "convert", "old", target, "--dtype", "float16", *more]
    # Freed memory returns to the kernel at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    status, peak = map(int, done.stderr.split()[-2:])
    assert status == 0
    # One file, at most 64 MiB of converted tensors, and the overhead.
    assert peak < 8 * size, f"{peak / size:.1f} files in memory"
    assert load_sharded(target)["7"].tolist()[:2] == [7, 7]
