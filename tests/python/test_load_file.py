"""load_file: its results for each kind of file and path, and the memory that its tensors share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from random_state import difference
from safetensors_torch import SafetensorError, load_file, load_model, safe_open, save_file
from support import DTYPES, aliases, entry, pack, sample, unprivileged

OPENERS = {
    "load_file": load_file,
    "safe_open": safe_open,
    "load_model": lambda path, **options: load_model(torch.nn.Linear(1, 1), path, **options),
}
by_every_opener = pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)


@pytest.fixture
def unaligned(write: Callable[..., Path]) -> Path:
    """A file that we never write: its F64 tensor begins 3 bytes past a multiple of 8."""
    header = {"pad": entry("U8", [3], 0, 3), "value": entry("F64", [2], 3, 19)}
    return write(pack(header, b"\1\2\3" + bytes(torch.tensor([0.5, -2.0], dtype=torch.float64).view(torch.uint8))))


@pytest.mark.parametrize("kind", [str, Path, os.fsencode], ids=["str", "PathLike", "bytes"])
def test_path_kinds(kind: Callable, path: Path, tensors: dict, backend: str) -> None:
    assert difference(load_file(kind(path), backend=backend), tensors) is None


@pytest.mark.parametrize("name", [b"with space", "größe-😀".encode(), b"\xff\xfe not utf-8", b"-", b"quote'\"\n"])
@pytest.mark.parametrize("decode", [os.fsencode, os.fsdecode], ids=["bytes", "str"])
def test_file_names_of_any_bytes(name: bytes, decode: Callable, tmp_path: Path, backend: str) -> None:
    tensors = {"a": torch.arange(3)}
    target = decode(os.fsencode(tmp_path) + b"/" + name)
    save_file(tensors, target)
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    assert difference(load_file(target, backend=backend), tensors) is None


def test_relative_path(path: Path, tensors: dict, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert difference(load_file(path.name, backend=backend), tensors) is None


@by_every_opener
@pytest.mark.parametrize("kind", [str, Path], ids=["str", "PathLike"])
def test_missing_file(opener: Callable, kind: Callable, tmp_path: Path, backend: str) -> None:
    absent = kind(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError) as caught:
        opener(absent, backend=backend)
    assert str(caught.value) == f"No such file or directory: {absent}"


@by_every_opener
def test_directory(opener: Callable, tmp_path: Path, backend: str) -> None:
    # All except load_file accept a directory with a checkpoint.
    error = IsADirectoryError if opener is OPENERS["load_file"] else SafetensorError
    with pytest.raises(error) as caught:
        opener(tmp_path, backend=backend)
    assert str(tmp_path) in str(caught.value)


@by_every_opener
def test_no_permission(opener: Callable, path: Path, backend: str) -> None:
    opener = load_file if opener is OPENERS["load_model"] else opener
    load_file(path, backend=backend)
    path.chmod(0)
    with unprivileged(), pytest.raises(PermissionError) as caught:
        opener(path, backend=backend)
    assert str(path) in str(caught.value)


@by_every_opener
@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_device_file(opener: Callable, device: str, backend: str) -> None:
    with pytest.raises(OSError, match=device):
        opener(device, backend=backend)


@pytest.mark.parametrize("filename", [None, 3, b"".join, ["a"]], ids=["None", "int", "method", "list"])
def test_other_paths_are_type_errors(filename: object, backend: str) -> None:
    with pytest.raises(TypeError):
        load_file(filename, backend=backend)


@by_every_opener
@pytest.mark.parametrize("unknown", ["foo", "", "MMAP", "read"])
def test_unknown_backend_lists_both(opener: Callable, unknown: str, path: Path) -> None:
    with pytest.raises(SafetensorError, match=r"\bmmap\b.*\bpread\b"):
        opener(path, backend=unknown)


def test_order_is_the_files(write: Callable[..., Path], backend: str) -> None:
    """Tensors are ordered by offset, and zero-size tensors that share an offset by name."""
    header = {
        "late": entry("U8", [2], 4, 6),
        "none_z": entry("U8", [0], 4, 4),
        "early": entry("F32", [1], 0, 4),
        "none_b": entry("F32", [0, 7], 4, 4),
        "none_a": entry("U8", [0], 4, 4),
        "first": entry("U8", [0], 0, 0),
        "end": entry("U8", [0], 6, 6),
    }
    given = write(pack(header, bytes(6)))
    loaded = load_file(given, backend=backend)
    assert type(loaded) is dict
    assert list(loaded) == ["first", "early", "none_a", "none_b", "none_z", "late", "end"]


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(code: str, write: Callable[..., Path], backend: str) -> None:
    tensors = {"matrix": sample(DTYPES[code]), "none": sample(DTYPES[code], (2, 0, 4))}
    assert difference(load_file(write(tensors), backend=backend), tensors) is None


@pytest.mark.parametrize("code", [code for code in DTYPES if code != "F4"])
def test_scalars(code: str, write: Callable[..., Path], backend: str) -> None:
    tensors = {"scalar": sample(DTYPES[code], ())}
    loaded = load_file(write(tensors), backend=backend)
    assert loaded["scalar"].shape == torch.Size([])
    assert difference(loaded, tensors) is None


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0), (2, 0, 5)], ids=str)
def test_zero_size_tensors(shape: tuple[int, ...], tmp_path: Path, backend: str) -> None:
    tensors = {"none": torch.empty(shape), "some": torch.ones(2)}
    save_file(tensors, tmp_path / "a")
    assert difference(load_file(tmp_path / "a", backend=backend), tensors) is None


def test_parameters_come_back_as_plain_tensors(tmp_path: Path, backend: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    (parameter * 3).sum().backward()
    save_file({"parameter": parameter, "result": parameter * 2}, tmp_path / "a")
    for tensor in load_file(tmp_path / "a", backend=backend).values():
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
        assert tensor.grad is None and tensor.grad_fn is None


def test_unaligned_data(unaligned: Path, backend: str) -> None:
    loaded = load_file(unaligned, backend=backend)
    assert loaded["pad"].tolist() == [1, 2, 3]
    assert loaded["value"].tolist() == [0.5, -2.0]
    assert loaded["value"].data_ptr() % 8 == 0


def test_writing_a_tensor_changes_memory_only(path: Path, tensors: dict, backend: str) -> None:
    before = path.read_bytes()
    loaded = load_file(path, backend=backend)
    for tensor in loaded.values():
        tensor.zero_()
        assert not tensor.any()
    gc.collect()
    assert path.read_bytes() == before
    assert difference(load_file(path, backend=backend), tensors) is None


def test_unaligned_tensors_are_writable_too(unaligned: Path, backend: str) -> None:
    before = unaligned.read_bytes()
    value = load_file(unaligned, backend=backend)["value"].add_(1)
    assert value.tolist() == [1.5, -1.0]
    assert unaligned.read_bytes() == before


def test_two_calls_never_alias(path: Path, tensors: dict, backend: str) -> None:
    first, second = load_file(path, backend=backend), load_file(path, backend=backend)
    for tensor in first.values():
        tensor.zero_()
    assert difference(second, tensors) is None


def test_tensors_of_one_call_never_alias_and_save_again(path: Path, tensors: dict, backend: str) -> None:
    loaded = load_file(path, backend=backend)
    for name, tensor in loaded.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        assert tensor.storage_offset() == 0, name
    save_file(loaded, path, {"format": "pt"})
    assert difference(load_file(path, backend=backend), tensors) is None


def test_tensors_outlive_one_another_and_the_file(path: Path, tensors: dict, backend: str) -> None:
    loaded = load_file(path, backend=backend)
    path.unlink()
    kept = {"weight": loaded.pop("weight")}
    del loaded
    gc.collect()
    assert difference(kept, {"weight": tensors["weight"]}) is None


def test_reads_through_one_handle(path: Path, backend: str) -> None:
    """Two reads of a tensor share memory through an mmap handle, and do not through pread."""
    with safe_open(path, backend=backend) as file:
        first, second = file.get_tensor("weight"), file.get_tensor("weight")
        assert aliases(first, second) == (backend == "mmap")
        first.fill_(7)
        assert bool((second == 7).all()) == (backend == "mmap")
    with safe_open(path, backend=backend) as file:
        assert not (file.get_tensor("weight") == 7).any()


def test_two_handles_never_alias(path: Path, tensors: dict, backend: str) -> None:
    with safe_open(path, backend=backend) as one, safe_open(path, backend=backend) as other:
        one.get_tensor("weight").zero_()
        assert difference({"weight": other.get_tensor("weight")}, {"weight": tensors["weight"]}) is None


def test_matches_the_reference(path: Path, backend: str, reference) -> None:
    expected = reference.load_file(path, backend=backend)
    loaded = load_file(path, backend=backend)
    assert list(loaded) == list(expected)
    assert difference(loaded, expected) is None


def test_header_at_the_limit_is_read(write: Callable[..., Path], backend: str) -> None:
    """100,000,000 bytes are allowed; the malformed files have a longer one."""
    limit = 100_000_000
    given = write(limit.to_bytes(8, "little") + b"{}".ljust(limit))
    assert load_file(given, backend=backend) == {}
    with given.open("r+b") as file:
        file.write((limit + 1).to_bytes(8, "little"))
        file.seek(0, os.SEEK_END)
        file.write(b" ")
    with pytest.raises(SafetensorError, match="(?i)header"):
        load_file(given, backend=backend)
