"""save_model: which of several tied names it keeps, how it records the others, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from random_state import difference
from safetensors_torch import load_file, load_model, save, save_model
from support import Tied, encode, entries, snapshot, unpack

FORCE_TEXT = " Or use save_model(..., force_contiguous=True), read the docs for potential caveats."


class Named(nn.Module):
    """A module with the given tensors as its parameters, tied if they share memory."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def metadata_of(path: Path) -> dict[str, str] | None:
    return json.loads(unpack(path.read_bytes())[0]).get("__metadata__")


@pytest.mark.parametrize("kind", [str, Path, os.fsencode], ids=["str", "PathLike", "bytes"])
def test_model_without_ties(kind: Callable, target: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert save_model(model, kind(target)) is None
    assert target.read_bytes() == encode(snapshot(model))
    assert metadata_of(target) is None


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}], ids=str)
def test_same_bytes_as_the_reference(metadata: dict | None, target: Path, tmp_path: Path, reference) -> None:
    for model in (Tied(), nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))):
        save_model(model, target, metadata)
        reference.save_model(model, tmp_path / "reference", dict(metadata) if metadata else metadata)
        if len(metadata_of(target) or {}) < 2:
            assert target.read_bytes() == (tmp_path / "reference").read_bytes()
        assert metadata_of(target) == metadata_of(tmp_path / "reference")
        assert difference(load_file(target), load_file(tmp_path / "reference")) is None


def test_metadata_is_written(target: Path) -> None:
    save_model(nn.Linear(2, 2), target, metadata={"format": "pt", "a": "b"})
    assert metadata_of(target) == {"a": "b", "format": "pt"}


def test_first_name_alphabetically_is_kept(target: Path) -> None:
    """The head comes first in the model; the embedding in the alphabet."""
    model = Tied()
    save_model(model, target)
    assert sorted(load_file(target)) == ["embedding.weight", "norm.bias", "norm.weight"]
    assert torch.equal(load_file(target)["embedding.weight"], model.head.weight)
    assert metadata_of(target) == {"head.weight": "embedding.weight"}


BASE = torch.arange(12.0)
TIES = {
    "three names": ({"c": BASE, "a": BASE, "b": BASE}, ["a"], {"b": "a", "c": "a"}),
    "capitals sort first": ({"a": BASE, "B": BASE}, ["B"], {"a": "B"}),
    "a part of the whole": ({"a": BASE[2:5], "b": BASE}, ["b"], {"a": "b"}),
    "a part at the start": ({"a": BASE[:5], "b": BASE}, ["b"], {"a": "b"}),
    "several wholes": ({"a": BASE[2:5], "d": BASE, "c": BASE.view(3, 4)}, ["c"], {"a": "c", "d": "c"}),
    # It has as many elements as the storage, but all are the first one.
    "an expanded part": ({"a": BASE[:1].expand(12), "b": BASE}, ["b"], {"a": "b"}),
    "parts that are apart": (
        {"a": BASE[:2], "b": BASE[8:], "whole": BASE},
        ["whole"],
        {"a": "whole", "b": "whole"},
    ),
    "two groups": (
        {"b": BASE, "a": BASE, "y": torch.ones(4).view(2, 2), "z": torch.zeros(3)},
        ["a", "y", "z"],
        {"b": "a"},
    ),
}


@pytest.mark.parametrize("tensors, kept, dropped", TIES.values(), ids=TIES)
def test_ties(tensors: dict, kept: list[str], dropped: dict[str, str], target: Path) -> None:
    save_model(Named(**tensors), target)
    assert difference(load_file(target), {name: tensors[name] for name in kept}) is None
    assert metadata_of(target) == dropped


def test_kept_name_covers_a_transposed_tensor_too(target: Path) -> None:
    square = torch.arange(6.0).reshape(2, 3)
    save_model(Named(b=square, a=square.t()), target)
    assert difference(load_file(target), {"a": square.t().contiguous()}) is None
    assert metadata_of(target) == {"b": "a"}


def test_the_callers_metadata_wins(target: Path) -> None:
    save_model(Named(a=BASE, b=BASE, c=BASE), target, metadata={"b": "mine", "x": "y"})
    assert metadata_of(target) == {"b": "mine", "c": "a", "x": "y"}
    assert list(load_file(target)) == ["a"]


def test_the_callers_dict_does_not_change(target: Path) -> None:
    metadata = {"format": "pt"}
    save_model(Tied(), target, metadata)
    assert metadata == {"format": "pt"}
    assert metadata_of(target) == {"format": "pt", "head.weight": "embedding.weight"}


def test_no_name_covers_the_storage(target: Path) -> None:
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="(?i)cover") as caught:
        save_model(Named(left=BASE[:6], right=BASE[2:8]), target)
    assert "left" in str(caught.value) and "right" in str(caught.value)
    assert target.read_bytes() == b"old"
    assert entries(target.parent) == [target.name]


def strided() -> nn.Module:
    return Named(good=torch.ones(2), odd=torch.arange(6.0).reshape(2, 3).t())


@pytest.mark.parametrize("options", [{}, {"force_contiguous": True}], ids=["default", "True"])
def test_force_contiguous(options: dict, target: Path) -> None:
    model = strided()
    save_model(model, target, **options)
    expected = {"good": torch.ones(2), "odd": torch.tensor([[0.0, 3], [1, 4], [2, 5]])}
    assert difference(load_file(target), expected) is None
    assert not model.odd.is_contiguous()


def test_without_force_contiguous(target: Path) -> None:
    target.write_bytes(b"old")
    with pytest.raises(ValueError) as caught:
        save_model(strided(), target, force_contiguous=False)
    with pytest.raises(ValueError) as of_save:
        save({"odd": strided().odd})
    assert str(caught.value) == str(of_save.value) + FORCE_TEXT
    assert target.read_bytes() == b"old"


class WithMore(Named):
    """There is also an error that does not concern contiguity."""

    def __init__(self, more: object) -> None:
        super().__init__(odd=strided().odd)
        self.more = (more,)  # a tensor that the module does not register as a buffer

    def state_dict(self, *arguments: object, **options: object) -> dict:
        return {**super().state_dict(*arguments, **options), "more": self.more[0]}


NOT_OF_STRIDES = {
    "sparse": lambda target: save_model(WithMore(torch.eye(3).to_sparse()), target, force_contiguous=False),
    "lazy": lambda target: save_model(WithMore(nn.UninitializedBuffer()), target, force_contiguous=False),
    "no tensor": lambda target: save_model(WithMore({"a": 1}), target, force_contiguous=False),
    "null byte": lambda target: save_model(strided(), f"{target}\0", force_contiguous=False),
    "surrogate": lambda target: save_model(nn.Linear(1, 1), target, {"a": "\ud800"}, force_contiguous=False),
}


@pytest.mark.parametrize("what", NOT_OF_STRIDES)
def test_other_refusals_do_not_speak_of_force_contiguous(what: str, target: Path) -> None:
    with pytest.raises(ValueError) as caught:
        NOT_OF_STRIDES[what](target)
    assert "force_contiguous" not in str(caught.value)
    assert type(caught.value) is (UnicodeEncodeError if what == "surrogate" else ValueError)
    assert entries(target.parent) == []


def test_without_force_contiguous_a_contiguous_model_is_saved(target: Path) -> None:
    model = Tied()
    save_model(model, target, force_contiguous=False)
    assert sorted(load_file(target)) == ["embedding.weight", "norm.bias", "norm.weight"]


def test_channels_last_weights(target: Path) -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    save_model(model, target)
    assert load_file(target)["weight"].is_contiguous()
    assert torch.equal(load_file(target)["weight"], model.weight)


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("saved", torch.arange(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)


def test_buffers(target: Path) -> None:
    save_model(WithBuffers(), target)
    assert difference(load_file(target), {"saved": torch.arange(3)}) is None


class WithExtraState(nn.Module):
    def __init__(self, state: object) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_extra_state_that_is_a_tensor(target: Path) -> None:
    save_model(WithExtraState(torch.arange(3)), target)
    assert difference(load_file(target), {"_extra_state": torch.arange(3)}) is None


def test_extra_state_that_is_not_a_tensor(target: Path) -> None:
    with pytest.raises(ValueError, match="Key `_extra_state` is invalid, expected torch.Tensor but received"):
        save_model(WithExtraState({"a": 1}), target)
    assert entries(target.parent) == []


def test_model_without_state(target: Path) -> None:
    save_model(nn.ReLU(), target)
    assert target.read_bytes() == encode({})


def test_meta_model(target: Path) -> None:
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
        save_model(nn.Linear(2, 2, device="meta"), target)
    assert entries(target.parent) == []


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}], ids=str)
def test_metadata_that_is_not_a_str(metadata: dict, target: Path) -> None:
    with pytest.raises(TypeError):
        save_model(Tied(), target, metadata)
    assert entries(target.parent) == []


def test_the_model_does_not_change(target: Path) -> None:
    model = Tied()
    before, weight = snapshot(model), model.head.weight
    save_model(model, target)
    assert model.head.weight is weight is model.embedding.weight
    assert difference(snapshot(model), before) is None


def test_round_trip_of_ties(target: Path, backend: str) -> None:
    model, other = Tied(), Tied()
    save_model(model, target)
    assert load_model(other, target, backend=backend) == (set(), [])
    assert difference(snapshot(other), snapshot(model)) is None
    assert other.head.weight is other.embedding.weight
