"""safe_open: names, metadata, tensors, slices, and their state after the file is closed.

test_slices.py tests every kind of index; this file has shapes, dtypes, a few indices and the types of the errors.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import safetensors_torch
from random_state import difference
from safetensors_torch import SafetensorError
from support import DTYPES, bytes_read, encode, entry, pack, sample

MATRIX = torch.arange(12.0).reshape(3, 4)


def safe_open(path: Path, backend: str, **options: object) -> safetensors_torch.safe_open:
    return safetensors_torch.safe_open(path, framework="pt", backend=backend, **options)


@pytest.fixture
def matrix(write: Callable[..., Path]) -> Path:
    return write({"matrix": MATRIX, "scalar": torch.tensor(7)})


@pytest.fixture
def shuffled(write: Callable[..., Path]) -> Path:
    """Names whose order in the header, in the file and in the alphabet all differ."""
    header = {
        "é": entry("U8", [1], 5, 6),
        "b": entry("F32", [1], 0, 4),
        "\U0001f600": entry("U8", [0], 4, 4),
        "a": entry("U8", [2], 6, 8),
        "\uffff": entry("U8", [0], 4, 4),
        "B": entry("U8", [1], 4, 5),
    }
    return write(pack(header, bytes(8)))


SORTED = ["B", "a", "b", "é", "\uffff", "\U0001f600"]
IN_FILE = ["b", "\uffff", "\U0001f600", "B", "é", "a"]


@pytest.mark.parametrize("framework", ["pt", "torch", "pytorch"])
def test_frameworks(framework: str, path: Path, tensors: dict) -> None:
    with safetensors_torch.safe_open(path, framework) as file:
        assert difference(file.get_tensors(), tensors) is None


def test_framework_has_a_default(path: Path, tensors: dict) -> None:
    with safetensors_torch.safe_open(path) as file:
        assert difference(file.get_tensors(), tensors) is None


@pytest.mark.parametrize("framework", ["np", "numpy", "tf", "tensorflow", "jax", "flax", "mlx", "paddle", "PT", ""])
def test_another_framework(framework: str, path: Path) -> None:
    with pytest.raises(SafetensorError, match="(?i)torch") as caught:
        safetensors_torch.safe_open(path, framework=framework)
    assert framework in str(caught.value)


def test_keys_are_sorted_by_bytes(shuffled: Path, backend: str) -> None:
    with safe_open(shuffled, backend) as file:
        assert file.keys() == SORTED


def test_offset_keys_are_in_file_order(shuffled: Path, backend: str) -> None:
    with safe_open(shuffled, backend) as file:
        assert file.offset_keys() == IN_FILE


def test_get_tensors_is_a_dict_in_file_order(shuffled: Path, backend: str) -> None:
    with safe_open(shuffled, backend) as file:
        loaded = file.get_tensors()
        assert type(loaded) is dict
        assert list(loaded) == IN_FILE
        assert difference(loaded, {name: file.get_tensor(name) for name in SORTED}) is None


def test_contains_len_and_iteration(shuffled: Path, backend: str) -> None:
    with safe_open(shuffled, backend) as file:
        assert len(file) == 6
        assert sorted(file) == sorted(SORTED)
        assert all(name in file for name in SORTED)
        assert "c" not in file and "" not in file and "__metadata__" not in file


def test_iteration_is_over_keys(shuffled: Path, backend: str) -> None:
    with safe_open(shuffled, backend) as file:
        assert list(file) in (SORTED, IN_FILE)
        assert list(file) == list(file)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"b": "", "": "é\n", "a": "1"}], ids=str)
def test_metadata(metadata: dict | None, write: Callable[..., Path], backend: str) -> None:
    with safe_open(write({"a": torch.ones(1)}, metadata), backend) as file:
        assert file.metadata() == metadata
        assert metadata is None or type(file.metadata()) is dict


def test_empty_file(write: Callable[..., Path], backend: str) -> None:
    with safe_open(write({}), backend) as file:
        assert (file.keys(), file.offset_keys(), len(file), list(file)) == ([], [], 0, [])
        assert file.get_tensors() == {}
        assert file.metadata() is None


def test_get_tensor(path: Path, tensors: dict, backend: str) -> None:
    with safe_open(path, backend) as file:
        loaded = {name: file.get_tensor(name) for name in tensors}
    assert difference(loaded, tensors) is None


def test_tensors_remain_valid_after_closing(path: Path, tensors: dict, backend: str) -> None:
    with safe_open(path, backend) as file:
        one, all_of_them = file.get_tensor("weight"), file.get_tensors()
    del file
    gc.collect()
    path.unlink()
    assert difference({"weight": one}, {"weight": tensors["weight"]}) is None
    assert difference(all_of_them, tensors) is None


@pytest.mark.parametrize("name", ["absent", "", "Weight", "weight ", "wei", "__metadata__", "é"])
@pytest.mark.parametrize("method", ["get_tensor", "get_slice"])
def test_missing_name(name: str, method: str, path: Path, backend: str) -> None:
    with safe_open(path, backend) as file, pytest.raises(SafetensorError) as caught:
        getattr(file, method)(name)
    # It begins as the reference's, and has the file and names that exist.
    assert str(caught.value).startswith(f"File does not contain tensor {name} ('{path}'); ")
    assert re.search("did you mean .*'weight'|it has 7 names: 'bias'", str(caught.value))


def test_missing_name_in_a_file_without_tensors(write: Callable[..., Path], backend: str) -> None:
    with safe_open(write({}), backend) as file, pytest.raises(SafetensorError, match="; it has no tensors$"):
        file.get_tensor("a")


def test_a_lone_surrogate_is_in_no_file(path: Path, backend: str) -> None:
    with safe_open(path, backend) as file:
        assert "\ud800" not in file
        for method in (file.get_tensor, file.get_slice):
            with pytest.raises(SafetensorError) as caught:
                method("a\ud800")
            assert str(caught.value).startswith("File does not contain tensor a\\ud800 (")


@pytest.mark.parametrize("unknown", ["\ud800", "mmap\ud800", "é", "io", 3, None], ids=ascii)
def test_an_unknown_backend_lists_both(unknown: object, path: Path) -> None:
    for function in (safetensors_torch.safe_open, safetensors_torch.load_file):
        with pytest.raises(SafetensorError, match="(?s)mmap.*pread"):
            function(path, backend=unknown)


AFTER_CLOSING = {
    "keys": lambda file: file.keys(),
    "offset_keys": lambda file: file.offset_keys(),
    "metadata": lambda file: file.metadata(),
    "get_tensor": lambda file: file.get_tensor("weight"),
    "get_tensor of an absent name": lambda file: file.get_tensor("absent"),
    "get_tensors": lambda file: file.get_tensors(),
    "get_slice": lambda file: file.get_slice("weight"),
    "get_shape": lambda file: file.get_shape("weight"),
    "get_dtype": lambda file: file.get_dtype("weight"),
    "index": lambda file: file["weight"],
    "items": lambda file: list(file.items()),
    "values": lambda file: list(file.values()),
    "pickle": lambda file: pickle.dumps(file),
    "copy": lambda file: copy.copy(file),
    "in": lambda file: "weight" in file,
    "len": lambda file: len(file),
    "iteration": lambda file: list(file),
}


@pytest.mark.parametrize("use", AFTER_CLOSING.values(), ids=AFTER_CLOSING)
@pytest.mark.parametrize("failed", [False, True], ids=["", "left by an exception"])
def test_use_after_closing(use: Callable, failed: bool, path: Path, backend: str) -> None:
    if failed:
        with pytest.raises(LookupError, match="mine"), safe_open(path, backend) as file:
            raise LookupError("mine")
    else:
        with safe_open(path, backend) as file:
            pass
    with pytest.raises(SafetensorError) as caught:
        use(file)
    assert str(caught.value) == f"File is closed: '{path}'; call safe_open again"


def test_use_without_a_with_block(path: Path, tensors: dict, backend: str) -> None:
    file = safe_open(path, backend)
    assert difference(file.get_tensors(), tensors) is None
    with file as entered:
        assert entered is file
        assert difference({"weight": file.get_tensor("weight")}, {"weight": tensors["weight"]}) is None
    file.close()
    file.close()
    with pytest.raises(SafetensorError, match="^File is closed: "):
        file.keys()


def test_slices_remain_valid_after_closing(matrix: Path, backend: str) -> None:
    with safe_open(matrix, backend) as file:
        used, unused = file.get_slice("matrix"), file.get_slice("matrix")
        assert torch.equal(used[0], MATRIX[0])
    del file
    gc.collect()
    for taken in (used, unused):
        assert taken.get_shape() == [3, 4]
        assert taken.get_dtype() == "F32"
        assert torch.equal(taken[1:, 2], MATRIX[1:, 2])
        assert torch.equal(taken[...], MATRIX)


@pytest.mark.parametrize("code", DTYPES)
def test_slice_dtype(code: str, write: Callable[..., Path], backend: str) -> None:
    tensor = sample(DTYPES[code], (2, 4))
    with safe_open(write({"a": tensor}), backend) as file:
        part = file.get_slice("a")
        assert part.get_dtype() == code
        assert difference({"a": part[...], "row": part[1]}, {"a": tensor, "row": tensor[1]}) is None


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3, 4, 5)], ids=str)
def test_slice_shape(shape: tuple[int, ...], write: Callable[..., Path], backend: str) -> None:
    tensor = sample(torch.int16, shape)
    with safe_open(write({"a": tensor}), backend) as file:
        part = file.get_slice("a")
        assert type(part.get_shape()) is list
        assert part.get_shape() == list(shape)
        assert difference({"a": part[...]}, {"a": tensor}) is None


INDICES = {
    "int": 1,
    "negative int": -1,
    "slice": slice(1, 3),
    "step": slice(None, None, 2),
    "clamped": slice(-100, 100),
    "empty": slice(2, 1),
    "two": (slice(0, 2), 3),
    "ellipsis": (..., slice(1, 3)),
    "all": ...,
    "two ellipses": (..., ...),
    "two ellipses around an int": (..., 1, ...),
    "two ellipses before an int": (0, ..., ..., 1),
    "three ellipses": (..., slice(1, 3), ..., ...),
    "none": None,
    "true": True,
    "list": ([0, 2],),
    "index tensor": torch.tensor([2, 0]),
    "nothing": (),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_slice_equals_torch(index: object, matrix: Path, backend: str) -> None:
    with safe_open(matrix, backend) as file:
        part, expected = file.get_slice("matrix")[index], MATRIX[index]
    assert (part.dtype, part.shape) == (expected.dtype, expected.shape)
    assert torch.equal(part, expected)


REFUSED = {
    "int too large": (3, IndexError),
    "int too small": (-4, IndexError),
    "int in the second place": ((0, 4), IndexError),
    "too many": ((0, 0, 0), IndexError),
    "too many beside an ellipsis": ((0, ..., 0, 0), IndexError),
    "step of 0": (slice(None, None, 0), ValueError),
    "negative step": (slice(None, None, -1), ValueError),
    "float": (1.5, IndexError),
    "str": ("x", TypeError),
    "list out of range": ([3], IndexError),
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("index, error", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses(index: object, error: type, matrix: Path, backend: str) -> None:
    with pytest.raises(error) as torchs:
        MATRIX[index]
    with safe_open(matrix, backend) as file, pytest.raises(error) as ours:
        file.get_slice("matrix")[index]
    assert type(ours.value) is type(torchs.value)


def test_scalar_has_no_dimension_to_index(matrix: Path, backend: str) -> None:
    with safe_open(matrix, backend) as file:
        part = file.get_slice("scalar")
        assert part[...].item() == 7 and part[()].item() == 7
        with pytest.raises(IndexError):
            part[0]


NARROW = {
    "row": (7, 1),
    "rows": (slice(5, 9), 4),
    "part of some rows": ((slice(3, 1000, 100), slice(10, 20)), 10),
    "column": ((..., 3), 1),
    "one element": ((-1, -1), 1),
    "nothing": (slice(9, 3), 0),
}


@pytest.mark.alone
@pytest.mark.parametrize("index, rows", NARROW.values(), ids=NARROW)
def test_pread_reads_only_what_a_slice_needs(index: object, rows: int, write: Callable[..., Path]) -> None:
    """A slice of 64 MiB in rows of 16 KiB reads at most this many rows."""
    given = write(pack({"a": entry("F32", [4096, 4096], 0, 64 << 20)}))
    with given.open("r+b") as file:
        file.truncate(given.stat().st_size + (64 << 20))
    with safe_open(given, "pread") as file:
        part = file.get_slice("a")
        before = bytes_read()
        assert not part[index].any()
        # Reads of /proc count too.
        assert bytes_read() - before <= rows * (16 << 10) + 4096


def test_slices_never_alias_the_file(matrix: Path, backend: str) -> None:
    before = matrix.read_bytes()
    with safe_open(matrix, backend) as file:
        file.get_slice("matrix")[1:].zero_()
    assert matrix.read_bytes() == before
    with safe_open(matrix, backend) as file:
        assert torch.equal(file.get_tensor("matrix"), MATRIX)


def test_opening_checks_the_file(write: Callable[..., Path], backend: str) -> None:
    given = write(encode({"a": torch.ones(3)})[:-1])
    with pytest.raises(SafetensorError):
        safe_open(given, backend)


def test_matches_the_reference(path: Path, backend: str, reference) -> None:
    with safe_open(path, backend) as ours, reference.safe_open(path, "pt", backend=backend) as theirs:
        assert ours.keys() == theirs.keys()
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata()
        assert difference(ours.get_tensors(), theirs.get_tensors()) is None
        for name in theirs.keys():
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
            assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()


@pytest.mark.parametrize("given", [Path, bytes, str], ids=["Path", "bytes", "str"])
@pytest.mark.parametrize(
    "way", [lambda file: pickle.loads(pickle.dumps(file)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"]
)
def test_a_pickle_or_a_copy_opens_the_path_again(
    way: Callable, given: Callable, matrix: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(matrix.parent)
    with safe_open(given(Path(matrix.name)), backend, device="meta") as file:
        monkeypatch.chdir("/")  # the path was relative to the directory in which it was opened
        again = way(file)
    assert again.get_tensor("matrix").is_meta
    assert repr(again) == repr(
        safe_open(os.fsencode(matrix) if given is bytes else str(matrix), backend, device="meta")
    )
    again = way(safe_open(matrix, backend))
    # With "mmap", two reads share memory.
    aliased = again.get_tensor("matrix").data_ptr() == again.get_tensor("matrix").data_ptr()
    assert aliased == (backend == "mmap")
    assert torch.equal(again.get_tensor("matrix"), MATRIX)


def test_a_pickle_of_a_variant_keeps_its_options(tmp_path: Path) -> None:
    safetensors_torch.save_sharded({"a": MATRIX}, tmp_path, stem="model.fp16")
    file = safetensors_torch.safe_open(tmp_path, variant="fp16", extra="ignore")
    assert pickle.loads(pickle.dumps(file)).keys() == ["a"]


def test_a_pickle_of_a_file_that_is_gone(matrix: Path) -> None:
    data = pickle.dumps(safetensors_torch.safe_open(matrix))
    matrix.unlink()
    with pytest.raises(FileNotFoundError, match=matrix.name):
        pickle.loads(data)


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_contents_slices_and_writers_are_neither_pickled_nor_copied(
    way: Callable, matrix: Path, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="cannot pickle or copy <safe_open bytes .*save the bytes to a file"):
        way(safetensors_torch.safe_open(matrix.read_bytes()))
    with safetensors_torch.safe_open(matrix) as file:
        part = file.get_slice("matrix")
        with pytest.raises(TypeError, match=r"cannot pickle or copy <slice of 'matrix'.*get_slice\('matrix'\)"):
            way(part)
        assert part[1, 1] == 5
    writer = safetensors_torch.IncrementalWriter(tmp_path / "new", {"a": MATRIX})
    with pytest.raises(TypeError, match="cannot pickle or copy <IncrementalWriter .*send the tensors to that process"):
        way(writer)
    writer.discard()
