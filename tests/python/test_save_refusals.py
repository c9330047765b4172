"""What save, save_file and save_model refuse, in which order and with which text; the target stays as it was."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from safetensors_torch import SafetensorError, load, save, save_file
from support import encode, entries, groups_in

ONES = torch.ones(2, 3)


@pytest.fixture(params=["save", "save_file"])
def saver(request: pytest.FixtureRequest, tmp_path: Path) -> Callable:
    """save, or save_file to a new file."""
    if request.param == "save":
        return save
    return lambda tensors, metadata=None: save_file(tensors, tmp_path / "new.safetensors", metadata)


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(2)


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 10, torch.quint8)


SPARSE_TEXT = (
    "You are trying to save a sparse tensors: `{}` which this library does not support. You can make it a dense tensor "
    "before saving with `.to_dense()` but be aware this might make a much larger file than needed."
)

# One error of each numbered kind: a part of a dict of tensors, the type, and a part of the text.
FAULTS = {
    "no tensor": ({"plain": [1.0]}, ValueError, "Key `plain` is invalid, expected torch.Tensor"),
    "sparse": ({"sparse": ONES.to_sparse()}, ValueError, "sparse tensors: `['sparse']`"),
    "shared": ({"tied": ONES, "to": ONES}, RuntimeError, "share memory"),
    "strided": ({"strided": torch.ones(2, 3).t()}, ValueError, "`strided`"),
    "meta": ({"meta": torch.ones(2, device="meta")}, RuntimeError, "Cannot copy out of meta tensor"),
    "no str": ({7: torch.ones(1)}, TypeError, ""),
    "no code": ({"wide": torch.ones(1, dtype=torch.complex128)}, SafetensorError, "complex128"),
}
# The last two have the same rank.
PAIRS = [pair for pair in itertools.combinations(FAULTS, 2) if pair != ("no str", "no code")]


@pytest.mark.parametrize("first, second", PAIRS)
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_order_of_the_checks(first: str, second: str, swapped: bool, saver: Callable) -> None:
    """Of two errors the earlier in the list is raised, wherever it is in the dict."""
    parts = [FAULTS[first][0], FAULTS[second][0]]
    tensors = {name: value for part in (reversed(parts) if swapped else parts) for name, value in part.items()}
    _, error, text = FAULTS[first]
    with pytest.raises(error) as caught:
        saver(tensors)
    assert text in str(caught.value)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("no str", "no code")])
def test_metadata_is_checked_last(fault: str, saver: Callable) -> None:
    tensors, error, text = FAULTS[fault]
    with pytest.raises(error) as caught:
        saver(tensors, metadata={"a": 1})
    assert text in str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("exists", [True, False])
def test_the_target_does_not_change(fault: str, exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    if exists:
        target.write_bytes(b"what was there")
    before = target.stat() if exists else None
    tensors, error, _ = FAULTS[fault]
    with pytest.raises(error):
        save_file({"good": torch.ones(3), **tensors}, target)
    assert entries(tmp_path) == (["model.safetensors"] if exists else [])
    if before:
        after = target.stat()
        assert target.read_bytes() == b"what was there"
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "wrong, kind", [("abc", "str"), ([("a", ONES)], "list"), (None, "NoneType"), (ONES, "torch.Tensor")]
)
def test_something_other_than_a_dict(wrong: object, kind: str, saver: Callable) -> None:
    with pytest.raises(ValueError) as caught:
        saver(wrong)
    text, _, remedy = str(caught.value).partition("; ")
    assert text == f"Expected a dict of [str, torch.Tensor] but received <class '{kind}'>"
    assert remedy


def test_an_ordered_dict_is_a_dict() -> None:
    assert save(OrderedDict(b=torch.ones(2), a=torch.zeros(2))) == encode({"a": torch.zeros(2), "b": torch.ones(2)})


@pytest.mark.parametrize("wrong, kind", [({}, "dict"), (None, "NoneType"), (1.5, "float")])
def test_value_that_is_not_a_tensor(wrong: object, kind: str, saver: Callable) -> None:
    with pytest.raises(ValueError) as caught:
        saver({"good": ONES, "test": wrong})
    text, _, remedy = str(caught.value).partition("; ")
    assert text == f"Key `test` is invalid, expected torch.Tensor but received <class '{kind}'>"
    assert "torch.as_tensor()" in remedy


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_sparse(layout: torch.layout, saver: Callable) -> None:
    with pytest.raises(ValueError) as caught:
        saver({"good": ONES, "test": torch.eye(3).to_sparse(layout=layout)})
    assert str(caught.value) == SPARSE_TEXT.format(["test"])


def test_all_sparse_tensors_are_listed(saver: Callable) -> None:
    with pytest.raises(ValueError) as caught:
        saver({"b": ONES.to_sparse(), "good": ONES, "a": ONES.to_sparse()})
    assert str(caught.value) == SPARSE_TEXT.format(["b", "a"])


def views() -> dict[str, tuple[dict[str, torch.Tensor], list[set[str]]]]:
    """Dicts of tensors that share memory, and the groups that an error must list."""
    base, other, square = torch.arange(10.0), torch.arange(4), torch.arange(9.0).reshape(3, 3)
    return {
        "one tensor twice": ({"a": base, "b": base}, [{"a", "b"}]),
        "another shape": ({"a": base, "b": base.view(2, 5)}, [{"a", "b"}]),
        "another dtype": ({"a": base, "b": base.view(torch.int32)}, [{"a", "b"}]),
        "detached": ({"a": base, "b": base.detach()}, [{"a", "b"}]),
        "a part": ({"whole": base, "part": base[3:5]}, [{"whole", "part"}]),
        "an overlap": ({"a": base[:6], "b": base[5:]}, [{"a", "b"}]),
        "a chain": ({"a": base[:4], "b": base[3:7], "c": base[6:]}, [{"a", "b", "c"}]),
        "two groups": ({"a": base, "x": other, "b": base, "y": other}, [{"a", "b"}, {"x", "y"}]),
        "two groups in a storage": (
            {"a": base[:2], "b": base[1:3], "x": base[4:6], "y": base[5:8], "z": base[8:]},
            [{"a", "b"}, {"x", "y"}],
        ),
        "a bystander": ({"a": base, "alone": torch.arange(10.0), "b": base}, [{"a", "b"}]),
        "parts of a whole": ({"whole": base, "one": base[1:2], "two": base[5:6]}, [{"whole", "one", "two"}]),
        "nested thrice": (
            {"a": base, "b": base[1:8], "c": base[2:3], "d": base[4:5], "e": base[9:]},
            [{"a", "b", "c", "d", "e"}],
        ),
        "not contiguous": ({"a": square, "b": square.t()}, [{"a", "b"}]),
        "expanded": ({"a": base, "b": base[:1].expand(7)}, [{"a", "b"}]),
    }


@pytest.mark.parametrize("case", views())
def test_shared_memory(case: str, saver: Callable) -> None:
    tensors, groups = views()[case]
    with pytest.raises(RuntimeError) as caught:
        saver(tensors)
    message = str(caught.value)
    assert "share memory" in message
    assert "save_model" in message
    assert sorted(map(sorted, groups_in(message))) == sorted(map(sorted, groups))


def test_disjoint_views_are_allowed() -> None:
    base = torch.arange(10.0)
    views = {"c": base[:3], "a": base[3:7], "b": base[7:]}
    assert save(views) == encode({name: view.clone() for name, view in views.items()})


def test_zero_byte_storages_share_nothing() -> None:
    empty = torch.zeros(0)
    assert save({"a": empty, "b": empty}) == encode({"a": torch.zeros(0), "b": torch.zeros(0)})


def test_meta_tensors_do_not_share_memory(saver: Callable) -> None:
    meta = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
        saver({"a": meta, "b": meta})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3).t(),
        torch.ones(4)[::2],
        torch.ones(1).expand(3),
        torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "expanded", "channels_last"],
)
def test_not_contiguous(tensor: torch.Tensor, saver: Callable) -> None:
    with pytest.raises(ValueError) as caught:
        saver({"good": ONES, "test": tensor})
    assert "`test`" in str(caught.value)
    assert "`.contiguous()`" in str(caught.value)


def test_strides_of_dimensions_of_size_1_are_ignored() -> None:
    tensors = {"row": torch.ones(1, 4).t(), "none": torch.ones(2, 0).t(), "middle": torch.ones(6)[2:4]}
    assert save(tensors) == encode({name: tensor.clone() for name, tensor in tensors.items()})


@pytest.mark.parametrize("make", [lambda: torch.ones(2, device="meta"), fake], ids=["meta", "fake"])
def test_tensors_without_data(make: Callable, saver: Callable) -> None:
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
        saver({"test": make()})


def test_fake_tensors_under_their_mode(saver: Callable, tmp_path: Path) -> None:
    sparse = ONES.to_sparse()
    with FakeTensorMode():
        model = torch.nn.Linear(2, 3)
        for tensors in ({"test": torch.ones(2)}, {"good": ONES, "test": torch.ones(2)}, dict(model.named_parameters())):
            with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
                saver(tensors)
        with pytest.raises(ValueError, match="sparse"):
            saver({"test": torch.ones(2), "sparse": sparse})
        with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
            saver({"test": torch.ones(2), 1: ONES})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", [1, None, b"name", ("a",), 1.5], ids=repr)
def test_key_that_is_not_a_str(key: object, saver: Callable) -> None:
    with pytest.raises(TypeError):
        saver({"good": ONES, key: torch.zeros(1)})


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {"a": None}, {"a": b"b"}, {"a": {"b": "c"}}, {1: "a"}, {None: "a"}, {b"a": "b"}], ids=repr
)
def test_metadata_that_is_not_a_str(metadata: dict, saver: Callable) -> None:
    with pytest.raises(TypeError):
        saver({"good": ONES}, metadata=metadata)


@pytest.mark.parametrize("metadata", ["format", 3], ids=repr)
def test_metadata_that_is_not_a_dict(metadata: object, saver: Callable) -> None:
    with pytest.raises(TypeError):
        saver({"good": ONES}, metadata=metadata)


@pytest.mark.parametrize(
    "name, metadata",
    [("a\ud800", None), ("\udfff", None), ("a", {"\ud83d": "b"}), ("a", {"b": "\udc00 c"})],
    ids=["name", "name alone", "metadata key", "metadata value"],
)
def test_lone_surrogate(name: str, metadata: dict | None, saver: Callable) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        saver({name: torch.ones(1)}, metadata=metadata)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "make, dtype",
    [
        (lambda: torch.ones(2, dtype=torch.complex128), "complex128"),
        (lambda: torch.ones(2, dtype=torch.complex32), "complex32"),
        (quantized, "quint8"),
    ],
    ids=["complex128", "complex32", "quantized"],
)
def test_dtype_without_a_code(make: Callable, dtype: str, saver: Callable) -> None:
    with pytest.raises(SafetensorError) as caught:
        saver({"good": ONES, "the.tensor": make()})
    assert "the.tensor" in str(caught.value)
    assert dtype in str(caught.value).lower()


def test_reserved_name(saver: Callable) -> None:
    with pytest.raises(SafetensorError, match="__metadata__"):
        saver({"__metadata__": ONES})


@pytest.mark.parametrize("place", ["name", "metadata"])
def test_header_over_the_limit(place: str, saver: Callable, tmp_path: Path) -> None:
    long = "n" * 100_000_000
    with pytest.raises(SafetensorError, match="(?i)header"):
        saver({long: ONES}) if place == "name" else saver({"a": ONES}, metadata={"a": long})
    assert entries(tmp_path) == []


def test_valid_values_are_saved() -> None:
    """The dict into which the faults above are put is itself saved."""
    assert load(save({"good": ONES}, {"a": "b"}))["good"].equal(ONES)
