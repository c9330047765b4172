"""The bytes that save and save_file write: header, padding, order, escapes, values."""

from __future__ import annotations

import itertools
import json
import random
import struct
from pathlib import Path

import pytest
import torch

from random_state import difference
from safetensors_torch import load, load_file, save, save_file
from support import CODES, DTYPES, bits, encode, sample, unpack

ZERO = torch.zeros(1)
STATES = {
    "one tensor": ({"a": torch.arange(6.0).reshape(2, 3)}, None),
    "no tensor": ({}, None),
    "metadata": ({"a": ZERO}, {"format": "pt"}),
    "empty metadata": ({"a": ZERO}, {}),
    "metadata alone": ({}, {"format": "pt"}),
    "scalar": ({"a": torch.tensor(3, dtype=torch.int16)}, None),
    "zero-size": ({"a": torch.zeros(2, 0), "b": torch.zeros(0, dtype=torch.int64), "c": ZERO}, None),
    "mixed": ({"z": torch.arange(3), "y": ZERO, "b": torch.tensor([True]), "a": torch.ones(3).half()}, {"k": "v"}),
    "parameter": ({"a": torch.nn.Parameter(torch.ones(2))}, None),
    "offset view": ({"a": torch.arange(10)[4:7]}, None),
}
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


@every_state
def test_bytes_follow_the_format(state: tuple) -> None:
    blob = save(*state)
    assert type(blob) is bytes
    assert blob == encode(*state)


@every_state
def test_bytes_equal_the_references(state: tuple, reference) -> None:
    assert save(*state) == reference.save(*state)


@every_state
def test_save_file_writes_what_save_gives(state: tuple, tmp_path: Path) -> None:
    tensors, metadata = state
    assert save_file(tensors, tmp_path / "a", metadata) is None
    assert (tmp_path / "a").read_bytes() == save(tensors, metadata)


def test_nothing_at_all() -> None:
    assert save({}) == b"\x08\0\0\0\0\0\0\0{}      "


def test_empty_metadata_without_tensors() -> None:
    """The reference writes broken JSON here."""
    header, data = unpack(save({}, metadata={}))
    assert header.rstrip(b" ") == b'{"__metadata__":{}}'
    assert len(header) % 8 == 0
    assert data == b""


def test_no_metadata_and_empty_metadata() -> None:
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    assert unpack(save({"a": ZERO}))[0].rstrip() == b"{" + entry
    assert unpack(save({"a": ZERO}, None))[0].rstrip() == b"{" + entry
    assert unpack(save({"a": ZERO}, {}))[0].rstrip() == b'{"__metadata__":{},' + entry


@pytest.mark.parametrize("length", range(17))
def test_header_is_padded_with_spaces(length: int) -> None:
    blob = save({"n" * length: torch.ones(3, dtype=torch.uint8)})
    (stated,) = struct.unpack("<Q", blob[:8])
    header = blob[8 : 8 + stated]
    assert stated % 8 == 0
    assert len(header) - len(header.rstrip(b" ")) < 8
    assert header.rstrip(b" ").endswith(b"}")
    assert blob[8 + stated :] == b"\1\1\1"


@every_state
def test_header_is_compact(state: tuple) -> None:
    header = unpack(save(*state))[0].rstrip(b" ")
    assert header == json.dumps(json.loads(header), separators=(",", ":"), ensure_ascii=False).encode()


def test_fields_and_their_order() -> None:
    header, _ = unpack(save({"a": torch.ones(2, 3), "b": torch.ones(4)}, {"x": "y"}))
    assert header.rstrip() == (
        b'{"__metadata__":{"x":"y"},'
        b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"b":{"dtype":"F32","shape":[4],"data_offsets":[24,40]}}'
    )


@pytest.mark.parametrize("name", ["", "!", "A", "__metadata", "a"])
def test_metadata_comes_first(name: str) -> None:
    """For all names and dtypes."""
    header, _ = unpack(save({name: torch.ones(1, dtype=torch.int64)}, {"z": "z"}))
    assert header.startswith(b'{"__metadata__":{"z":"z"},')


def test_metadata_is_sorted() -> None:
    keys = ["b", "a", "B", "", "é", "z", "aa", "\uffff", "\U0001f600", "~", "\x7f"]
    expected = sorted(keys, key=str.encode)
    for seed in range(5):
        random.Random(seed).shuffle(keys)
        header = json.loads(unpack(save({}, {key: key for key in keys}))[0])
        assert list(header["__metadata__"]) == expected


def test_data_has_no_gaps() -> None:
    tensors = {f"t{i}": torch.full((i,), i, dtype=torch.uint8) for i in range(6)} | {"odd": torch.ones(3).half()}
    header, data = unpack(save(tensors))
    offsets = [value["data_offsets"] for value in json.loads(header).values()]
    assert offsets[0][0] == 0
    assert all(left[1] == right[0] for left, right in itertools.pairwise(offsets))
    assert offsets[-1][1] == len(data) == 6 + 15


@pytest.mark.parametrize("seed", range(3))
def test_dtypes_are_in_order(seed: int) -> None:
    names = [f"{rank:02}" for rank in range(len(DTYPES))]
    random.Random(seed).shuffle(names)
    tensors = {name: sample(dtype) for name, dtype in zip(names, DTYPES.values(), strict=True)}
    shuffled = list(tensors.items())
    random.Random(seed + 9).shuffle(shuffled)
    header = json.loads(unpack(save(dict(shuffled)))[0])
    assert [value["dtype"] for value in header.values()] == [code for code in CODES if code in DTYPES]
    assert list(header) == names


def test_names_within_a_dtype_are_in_byte_order() -> None:
    names = ["b", "a", "B", "", "é", "z", "aa", "\uffff", "\U0001f600", "a.10", "a.2", "~"]
    expected = sorted(names, key=str.encode)
    random.Random(1).shuffle(names)
    assert list(json.loads(unpack(save({name: torch.ones(1) for name in names}))[0])) == expected


@pytest.mark.parametrize("code", DTYPES)
def test_code_shape_and_values_of_each_dtype(code: str) -> None:
    tensor = sample(DTYPES[code], (2, 6))
    header, data = unpack(save({"a": tensor}))
    described = json.loads(header)["a"]
    assert described["dtype"] == code
    assert described["shape"] == ([2, 12] if code == "F4" else [2, 6])
    assert data == bits(tensor)


@pytest.mark.skipif("F4" not in DTYPES, reason="this torch has no float4")
def test_packed_values_count_double_in_the_header() -> None:
    """Each element of torch's tensor is a byte with two values."""
    packed = sample(DTYPES["F4"], (3, 5))
    blob = save({"a": packed})
    assert json.loads(unpack(blob)[0])["a"] == {"dtype": "F4", "shape": [3, 10], "data_offsets": [0, 15]}
    assert load(blob)["a"].shape == (3, 5)


ESCAPES = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\t": "\\t",
    "\n": "\\n",
    "\f": "\\f",
    "\r": "\\r",
    "\0": "\\u0000",
    "\x01": "\\u0001",
    "\x0b": "\\u000b",
    "\x1b": "\\u001b",
    "\x1f": "\\u001f",
}
VERBATIM = ["/", "'", "\x7f", "\x80", "é", "\u2028", "\ufeff", "\uffff", "\U0001f600", "<&>", "%", "{}[],:"]


@pytest.mark.parametrize("text, written", [*ESCAPES.items(), *((text, text) for text in VERBATIM)], ids=ascii)
def test_escapes(text: str, written: str, reference) -> None:
    text, written = f"x{text}y", f'"x{written}y"'.encode()
    blob = save({text: ZERO}, {text: text})
    header = unpack(blob)[0]
    assert header.startswith(b'{"__metadata__":{' + written + b":" + written + b"}," + written + b":{")
    assert blob == reference.save({text: ZERO}, {text: text})
    assert list(load(blob)) == [text]


def test_every_control_character_as_the_reference_writes_it(reference) -> None:
    name = "".join(map(chr, range(0x100)))
    assert save({name: ZERO}) == reference.save({name: ZERO})


VALUES = {
    "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negative": torch._neg_view(torch.tensor([1.0, -2.0, 0.0])),
    "negative imaginary part": torch.tensor([1 + 2j, 3 - 4j]).conj().imag[:1],
    "conjugate of a negative": torch._neg_view(torch.tensor([1 + 2j])).conj(),
}


@pytest.mark.parametrize("view", VALUES.values(), ids=VALUES)
def test_conjugate_and_negative_views_save_their_values(view: torch.Tensor, tmp_path: Path) -> None:
    assert view.is_conj() or view.is_neg()
    values = {"a": torch.tensor(view.tolist())}
    assert save({"a": view}) == encode(values)
    save_file({"a": view}, tmp_path / "a")
    assert difference(load_file(tmp_path / "a"), values) is None
    assert view.is_conj() or view.is_neg()


def test_result_of_an_operation_that_requires_grad() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert save({"a": weight * 3}) == encode({"a": torch.full((2,), 3.0)})


def test_the_callers_dicts_stay_as_they_were() -> None:
    tensors, metadata = {"b": ZERO, "a": torch.ones(2)}, {"y": "1", "x": "2"}
    save(tensors, metadata)
    assert list(tensors) == ["b", "a"]
    assert metadata == {"y": "1", "x": "2"}


@pytest.mark.parametrize("size", [0, 1, 7, 4095, 4096, 4097, 1 << 20, (1 << 24) + 3])
def test_sizes_around_a_page_and_a_chunk(size: int, tmp_path: Path) -> None:
    data = torch.arange(size, dtype=torch.int64).remainder(251).to(torch.uint8)
    save_file({"a": data, "b": torch.ones(3)}, tmp_path / "a")
    blob = (tmp_path / "a").read_bytes()
    assert blob == save({"a": data, "b": torch.ones(3)})
    assert unpack(blob)[1] == b"\0\0\x80\x3f" * 3 + data.numpy().tobytes()


def test_lazy_copies_share_no_memory() -> None:
    """A copy-on-write clone has the address of its original until the first write."""
    original = torch.arange(4.0)
    copy = torch._lazy_clone(original)
    loaded = load(save({"original": original, "copy": copy}))
    assert torch.equal(loaded["original"], original) and torch.equal(loaded["copy"], original)
