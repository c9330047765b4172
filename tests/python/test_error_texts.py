"""Errors as objects: what pickling keeps of them; and their texts, of which nobody's data makes long ones."""

from __future__ import annotations

import copy
import errno
import io
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safetensors_torch import (
    IncrementalWriter,
    SafetensorError,
    edit_metadata,
    inspect,
    load,
    load_file,
    load_model,
    load_sharded,
    safe_open,
    save,
    save_file,
    save_sharded,
)
from support import encode, entry, pack

ONES = torch.ones(2)
LONG = "n" * 300_000
# The longest text: those of the native core show more than those of Python.
MOST = 10_000


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
def test_pickling_keeps_errno(again: Callable, tmp_path: Path) -> None:
    for path, kind, number in (
        (tmp_path / "absent", FileNotFoundError, errno.ENOENT),
        (tmp_path, IsADirectoryError, errno.EISDIR),
        (tmp_path / LONG[:300], OSError, errno.ENAMETOOLONG),
    ):
        with pytest.raises(OSError) as caught:
            load_file(path)
        for error in (caught.value, again(caught.value)):
            assert type(error) is kind
            assert error.errno == number
            assert str(error) == str(caught.value)
            assert "Errno" not in str(error)


def test_pickling_keeps_other_errors(tmp_path: Path) -> None:
    for call in (
        lambda: load(b"123"),
        lambda: save({"a": ONES, "b": ONES}),
        lambda: save({"a": torch.ones(2, 2)[:, 0]}),
    ):
        with pytest.raises(Exception) as caught:
            call()
        again = pickle.loads(pickle.dumps(caught.value))
        assert type(again) is type(caught.value)
        assert str(again) == str(caught.value)


def header(**tensors: Any) -> bytes:
    return pack(tensors, bytes(8))


def writer(specs: dict[str, Any], *writes: tuple[str, torch.Tensor]) -> None:
    with IncrementalWriter("/dev/shm/never-committed.safetensors", specs) as writer:
        for name, tensor in writes:
            writer.write(name, tensor)
        raise ValueError("no fault was found")


def model_with(name: str) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer(name, torch.ones(3))
    return module


CONTENTS = encode({"a": torch.arange(100_000.0)})

LONG_TEXTS: dict[str, Callable[[Path], Any]] = {
    "contents for a path": lambda path: load_file(CONTENTS),
    "text for a path": lambda path: load_file(LONG),
    "bytes for a path": lambda path: load_file(LONG.encode()),
    "contents to save to": lambda path: save_file({"a": ONES}, CONTENTS),
    "text to save to": lambda path: save_file({"a": ONES}, LONG),
    "text to save shards to": lambda path: save_sharded({"a": ONES}, LONG),
    "stem": lambda path: save_sharded({"a": ONES}, path.parent / "directory", stem="/" + LONG),
    "text to open": lambda path: safe_open(LONG),
    "text to edit": lambda path: edit_metadata(LONG, {"a": "b"}),
    "size": lambda path: save_sharded({"a": ONES}, path.parent / "directory", max_shard_size=LONG),
    "backend": lambda path: load_file(path, backend=LONG),
    "framework": lambda path: safe_open(path, LONG),
    "shared": lambda path: save({"a": ONES}, shared=LONG),
    "device": lambda path: load_file(path, names=LONG),
    "names": lambda path: load_file(path, names=[LONG]),
    "names that are no text": lambda path: load_file(path, names=[LONG.encode()]),
    "get_tensor": lambda path: safe_open(path).get_tensor(LONG),
    "get_slice": lambda path: safe_open(path).get_slice(LONG),
    "get_tensor, a surrogate": lambda path: safe_open(path).get_tensor(LONG + "\ud800"),
    "get_tensor from bytes": lambda path: safe_open(path.read_bytes()).get_tensor(LONG),
    "no tensor": lambda path: save({LONG: [1.0]}),
    "sparse": lambda path: save({LONG: torch.eye(2).to_sparse()}),
    "nested": lambda path: save({LONG: torch.nested.nested_tensor([ONES])}),
    "memory": lambda path: save({LONG: ONES, LONG + "m": ONES}),
    "memory that none covers": lambda path: save({LONG: ONES.expand(3, 2)[:, 1:], "b": ONES[1:]}, shared="keep_one"),
    "gaps": lambda path: save({LONG: torch.ones(2, 3).t()}),
    "meta": lambda path: save({LONG: torch.ones(2, device="meta")}),
    "dtype": lambda path: save({LONG: torch.ones(2, dtype=torch.complex128)}),
    "key": lambda path: save({(LONG,): ONES}),
    "metadata key": lambda path: save({"a": ONES}, {LONG: 1}),
    "metadata key that is no text": lambda path: save({"a": ONES}, {LONG.encode(): "a"}),
    "edited key": lambda path: edit_metadata(path, {LONG: 1}),
    "declaration": lambda path: writer({LONG: 1}),
    "declared shape": lambda path: writer({LONG: (torch.float32, LONG)}),
    "not declared": lambda path: writer({"a": ONES}, (LONG, ONES)),
    "declared otherwise": lambda path: writer({LONG: ONES}, (LONG, torch.ones(3))),
    "size mismatch": lambda path: load_model(model_with("b" * 200_000), encoded(path, {"b" * 200_000: ONES})),
    "missing": lambda path: load_model(model_with("b" * 200_000), path),
    "unexpected": lambda path: load_model(torch.nn.Module(), encoded(path, {LONG: ONES})),
    "name in a file": lambda path: load(header(**{LONG: entry("F128", [1], 0, 8)})),
    "name in a file that needs escapes": lambda path: load(header(**{"\x7f" * 200_000: entry("F32", [1], 0, 8)})),
    "dtype in a file": lambda path: load(header(a=entry(LONG, [1], 0, 8))),
    "field in a file": lambda path: load(header(a={LONG: 1})),
    "shape in a file": lambda path: load(header(a=entry("F32", LONG, 0, 8))),
    "long shape in a file": lambda path: load(header(a=entry("F32", [1] * 100_000, 0, 8))),
    "metadata in a file": lambda path: load(header(__metadata__={LONG: 1})),
    "value in a file": lambda path: load(header(__metadata__=LONG)),
}


def encoded(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(encode(tensors))
    return path


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", LONG_TEXTS)
def test_texts_stay_short(case: str, tmp_path: Path) -> None:
    path = encoded(tmp_path / "file", {"a": ONES})
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError, SafetensorError)) as caught:
        LONG_TEXTS[case](path)
    assert 10 < len(str(caught.value)) < MOST, str(caught.value)[:500]


# Colours, a title, lines; C1, directions, joiners. As a path it leads through a file.
CODES = "file/\x1b[31m\x1b]0;t\x07\r\n\t\x7f\x9b1m\u202e\u2066\u200b\ufeff\u2028\U000e0041"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", LONG_TEXTS)
def test_texts_control_no_terminal(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LONG", CODES)
    monkeypatch.chdir(tmp_path)
    path = encoded(tmp_path / "file", {"a": ONES})
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError, SafetensorError)) as caught:
        LONG_TEXTS[case](path)
    odd = {c for c in str(caught.value) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    # torch's texts about modules have lines.
    assert odd <= ({"\n", "\t"} if case in ("size mismatch", "missing", "unexpected") else set()), str(caught.value)


def test_long_values_are_truncated_with_their_length() -> None:
    with pytest.raises(ValueError) as caught:
        load_file(CONTENTS)
    text = str(caught.value)
    assert f"... ({len(CONTENTS)} bytes)" in text
    assert "load()" in text
    with pytest.raises(ValueError, match=r"`n{200}\.\.\. \(300000 bytes\)`"):
        save({LONG: torch.ones(2, 3).t()})
    with pytest.raises(ValueError, match=r"Key `n{200}\.\.\. \(300000 characters\)` is invalid"):
        save({LONG: 1})


def test_reprs_stay_short(tmp_path: Path) -> None:
    with safe_open(encode({LONG: ONES})) as file:
        assert len(repr(file)) < MOST
        assert len(repr(file.get_slice(LONG))) < MOST
    with safe_open(io.BytesIO(CONTENTS)) as file:
        assert repr(file) == "<safe_open BytesIO on cpu, open>"


def test_names_are_truncated_between_characters() -> None:
    name = "é" * 1001
    for shift in ("", "x"):
        with pytest.raises(ValueError, match="é... .*bytes"):
            save({shift + name: torch.ones(2, 3).t()})


@pytest.mark.parametrize("call", [load_file, load_sharded, lambda path: safe_open(path, "pt"), inspect])
def test_an_empty_path_is_visible(call: Callable) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        call("")
    assert '""' in str(caught.value)
