"""iterate: the tensors of several files in order, within a budget."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from proc import eventually, mapped_bytes, peak_growth
from random_state import difference
from safetensors_torch import SafetensorError, iterate, save_file, save_sharded
from support import entry, pack
from test_prefetch import reader_threads

MIB = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of 8 MiB; each tensor's first element is the number of its file."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        save_file({f"layer{i}.{j}": torch.full((MIB // 2,), i + j / 4) for j in range(4)}, path)
    return paths


def expected(*numbers: int) -> list[tuple[str, float]]:
    return [(f"layer{i}.{j}", i + j / 4) for i in numbers for j in range(4)]


def found(tensors: Any) -> list[tuple[str, float]]:
    return [(name, float(tensor.float()[-1])) for name, tensor in tensors]


def test_files_come_in_the_given_order(files: list[Path], backend: str) -> None:
    for order in ([0, 1, 2], [2, 0, 1], [1, 1]):
        paths = [files[i] for i in order]
        assert sorted(found(iterate(iter(paths), backend=backend))) == sorted(expected(*order))
        # With this budget, one tensor is read at a time.
        assert found(iterate(paths, buffer_bytes=1, backend=backend)) == expected(*order)
    for file in files:
        assert mapped_bytes(file) is None


def test_one_path(files: list[Path]) -> None:
    for path in (files[1], str(files[1]), os.fsencode(files[1])):
        assert sorted(found(iterate(path))) == expected(1)
    assert list(iterate([])) == []


def test_directories(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((1000,), float(i)) for i in range(9)}
    save_sharded(state, tmp_path / "a", max_shard_size=9000)
    index = tmp_path / "a" / "model.safetensors.index.json"
    assert difference(dict(iterate([tmp_path / "a"])), state) is None
    assert difference(dict(iterate(index)), state) is None


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["layer1.2"], ["layer1.2"]),
        (["layer2.0", "layer0.3", "layer0.3"], ["layer0.3", "layer2.0"]),
        (["*.1", "layer0.*"], ["layer0.0", "layer0.1", "layer0.2", "layer0.3", "layer1.1", "layer2.1"]),
        (re.compile(r"[12]\.3"), ["layer1.3", "layer2.3"]),
        (lambda name: name.endswith("0"), ["layer0.0", "layer1.0", "layer2.0"]),
        (iter(["layer0.1", "layer2.1"]), ["layer0.1", "layer2.1"]),
        ([], []),
    ],
)
def test_names(names: Any, chosen: list[str], files: list[Path]) -> None:
    assert [name for name, _ in iterate(files, names=names, buffer_bytes=1)] == chosen


def test_refused_names(files: list[Path]) -> None:
    for names in (["layer1.9"], ["layer9.*"]):
        with pytest.raises(SafetensorError, match=r"0.safetensors, .*: no tensor is called 'layer\d.*'; "):
            iterate(files, names=names)
    with pytest.raises(SafetensorError, match="did you mean 'layer1.3'"):
        iterate(files, names=["layer1.33"])
    with pytest.raises(TypeError, match="names must be a list"):
        iterate(files, names="layer1.2")
    with pytest.raises(SafetensorError, match="^files: no file is given, so none has a tensor 'a'; pass its path$"):
        iterate([], names=["a"])


def test_conversion(files: list[Path]) -> None:
    for name, tensor in iterate(files, dtype="bfloat16"):
        assert tensor.dtype == torch.bfloat16 and tensor.nbytes == MIB, name
    with pytest.raises(ValueError, match="must be a floating-point one"):
        iterate(files, dtype=torch.int32)


def test_progress(files: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    assert len(list(iterate(files, progress=lambda *bytes_done: seen.append(bytes_done)))) == 12
    assert seen[-1] == (24 * MIB, 24 * MIB) and seen == sorted(seen)
    with pytest.raises(TypeError, match="progress must be"):
        iterate(files, progress=1)  # type: ignore[arg-type]

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(iterate(files, progress=refuse))
    assert reader_threads() == 0


def test_errors_come_with_the_call(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        iterate([files[0], tmp_path / "nope"])
    with pytest.raises(TypeError, match="call it files"):
        iterate(paths=files)  # type: ignore[call-arg]
    (tmp_path / "f6").write_bytes(pack({"x": entry("F6_E2M3", [4], 0, 3)}, bytes(3)))
    with pytest.raises(SafetensorError, match="f6: .*'x'.*F6_E2M3"):
        iterate([files[0], tmp_path / "f6"])
    assert reader_threads() == 0


def test_a_file_that_is_truncated(files: list[Path]) -> None:
    tensors = iterate(files, buffer_bytes=1)
    os.truncate(files[2], 3 * MIB)
    seen = []
    with pytest.raises(SafetensorError, match=r"2.safetensors.*became shorter.*for tensor \"layer2.1"):
        for name, _ in tensors:
            seen.append(name)
    assert seen[:8] == [name for name, _ in expected(0, 1)]
    assert eventually(lambda: reader_threads() == 0)


def test_an_iterator_that_is_dropped_leaves_no_thread(files: list[Path]) -> None:
    tensors = iterate(files, buffer_bytes=1)
    assert eventually(lambda: reader_threads() > 0)
    del tensors
    assert eventually(lambda: reader_threads() == 0)
    for _ in iterate(files, buffer_bytes=1):
        break
    assert eventually(lambda: reader_threads() == 0)


def test_the_budget_bounds_the_memory(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(i)) for i in range(4)]
    for path in paths:
        save_file({f"t{i}": torch.full((MIB,), float(i)) for i in range(64)}, path)
    # 1 GiB in all.
    growth = peak_growth("", f"for _ in safetensors_torch.iterate({paths}, buffer_bytes='64MiB'): pass")
    assert growth < 80 * MIB
