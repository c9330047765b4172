"""The options of save, save_file and save_sharded for tensors that are not contiguous or share memory."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import torch

from proc import peak_growth
from safetensors_torch import load, load_sharded, save, save_file, save_model, save_sharded
from support import Tied, bits, encode, entries, unpack

WEIGHT = torch.arange(12.0).reshape(3, 4)


def shared() -> dict[str, torch.Tensor]:
    """Two groups of names that share memory, and one name that shares none."""
    whole, other = torch.arange(10.0), torch.arange(6).reshape(2, 3)
    return {"b": whole, "part": whole[2:5], "a": whole, "y": other.t(), "x": other, "alone": torch.ones(2)}


def test_gaps_are_refused_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`force_contiguous`"):
        save_file({"a": WEIGHT.t()}, tmp_path / "file")
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    "tensor",
    [
        WEIGHT.t(),
        WEIGHT[:, ::2],
        torch.ones(1).expand(3),
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.view_as_complex(torch.arange(12.0).reshape(3, 2, 2)).t().conj(),
    ],
    ids=["transposed", "strided", "expanded", "channels_last", "conjugate"],
)
def test_force_contiguous(tensor: torch.Tensor, tmp_path: Path) -> None:
    strides = tensor.stride()
    expected = encode({"a": tensor.resolve_conj().contiguous(), "b": torch.ones(2)})
    tensors = {"a": tensor, "b": torch.ones(2)}
    assert save(tensors, force_contiguous=True) == expected
    save_file(tensors, tmp_path / "file", force_contiguous=True)
    assert (tmp_path / "file").read_bytes() == expected
    save_sharded(tensors, tmp_path / "directory", max_shard_size=1, force_contiguous=True)
    assert bits(load_sharded(tmp_path / "directory")["a"]) == bits(tensor.resolve_conj().contiguous())
    assert tensors["a"] is tensor
    assert tensor.stride() == strides


def test_force_contiguous_takes_no_copy_of_all(tmp_path: Path) -> None:
    """One tensor is copied at a time; the allocator may keep the memory of a few."""
    setup = """
        tensors = {str(i): torch.ones(2, 512 << 10).t() for i in range(32)}
        safetensors_torch.save({"warm": tensors["0"][:9]}, force_contiguous=True)
    """
    work = f"safetensors_torch.save_file(tensors, {str(tmp_path / 'file')!r}, force_contiguous=True)"
    assert peak_growth(setup, work) < 64 << 20, "half of them"


@pytest.mark.parametrize("sharded", [False, True])
def test_one_of_each_group_is_kept(sharded: bool, tmp_path: Path) -> None:
    tensors, metadata = shared(), {"part": "the caller's", "k": "v"}
    names, options = list(tensors), {"shared": "keep_one"}
    noted = {"b": "a", "part": "the caller's", "y": "x", "k": "v"}
    kept = {name: tensors[name].contiguous() for name in ("a", "x", "alone")}
    if sharded:
        save_sharded(tensors, tmp_path, metadata, **options)
        assert (tmp_path / "model.safetensors").read_bytes() == encode(kept, {**noted, "format": "pt"})
    else:
        save_file(tensors, tmp_path / "file", metadata, **options)
        assert (tmp_path / "file").read_bytes() == encode(kept, noted)
        assert save(tensors, metadata, **options) == encode(kept, noted)
        assert json.loads(unpack(save(tensors, **options))[0])["__metadata__"] == {"b": "a", "part": "a", "y": "x"}
    assert list(tensors) == names
    assert metadata == {"part": "the caller's", "k": "v"}


def test_nothing_is_recorded_if_nothing_is_shared() -> None:
    tensors = {"a": WEIGHT, "b": torch.ones(2)}
    assert save(tensors, shared="keep_one") == encode(tensors)
    assert save(tensors, {}, shared="keep_one") == encode(tensors, {})


def test_shards_are_divided_without_the_dropped_names(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    tensors = {"a": whole, "b": whole, "c": torch.ones(10), "d": whole}
    written = save_sharded(tensors, tmp_path, max_shard_size=80, shared="keep_one")
    assert written == ["model.safetensors"]
    assert load_sharded(tmp_path).keys() == {"a", "c"}


def test_a_group_that_none_covers_is_refused(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    for save_it in (
        lambda tensors: save_file(tensors, tmp_path / "file", shared="keep_one"),
        lambda tensors: save_sharded(tensors, tmp_path / "directory", shared="keep_one"),
    ):
        with pytest.raises(RuntimeError, match=r"\{'x', 'y'\}.*entire storage"):
            save_it({"x": base[:6], "y": base[4:]})
    assert entries(tmp_path) == []


def test_unknown_options_are_refused() -> None:
    for word in ("keep", "", "\ud800"):
        with pytest.raises(ValueError, match='"error" or "keep_one"'):
            save({"a": WEIGHT}, shared=word)
    with pytest.raises(TypeError, match="force_contiguous must be a bool"):
        save({"a": WEIGHT}, force_contiguous=1)


def test_the_other_checks_stay() -> None:
    options = {"force_contiguous": True, "shared": "keep_one"}
    for tensors, error, text in (
        ({"a": WEIGHT.to_sparse(), "b": WEIGHT.t()}, ValueError, "sparse"),
        ({"a": WEIGHT.t().to("meta")}, RuntimeError, "meta"),
        ({"a": WEIGHT.t().to(torch.complex128)}, Exception, "complex128"),
        ({"a": WEIGHT.t(), 1: WEIGHT}, TypeError, "str"),
    ):
        with pytest.raises(error, match=text):
            save(tensors, **options)


def _without_gaps(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """huggingface_hub fails if a tensor that shares memory has gaps."""
    return {name: tensor for name, tensor in tensors.items() if tensor.is_contiguous()}


def states() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "tied": dict(Tied().state_dict()),
        "views": _without_gaps(shared()),
        "gaps": {"b": WEIGHT.t(), "a": torch.ones(2, 5).t(), "c": torch.ones(2, dtype=torch.int8)},
    }


@pytest.mark.parametrize("case", states())
@pytest.mark.parametrize("metadata", [None, {"step": "7", "format": "pt"}])
def test_files_are_those_of_huggingface_hub(case: str, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    theirs, ours, state = tmp_path / "theirs", tmp_path / "ours", states()[case]
    theirs.mkdir()
    # It changes its argument.
    huggingface_hub.save_torch_state_dict(dict(state), theirs, metadata=dict(metadata or {}))
    save_sharded(state, ours, metadata, force_contiguous=True, shared="keep_one")
    assert entries(ours) == entries(theirs) == ["model.safetensors"]
    (our_header, our_data), (their_header, their_data) = (
        unpack((directory / "model.safetensors").read_bytes()) for directory in (ours, theirs)
    )
    assert our_data == their_data
    assert len(our_header) == len(their_header)
    # Theirs has the metadata in random order.
    assert list(json.loads(our_header).items()) == list(json.loads(their_header).items())


def test_shards_are_those_of_huggingface_hub(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    state = {**_without_gaps(shared()), **{f"layer.{i}": torch.full((4, 5), float(i)).t() for i in range(5)}}
    huggingface_hub.save_torch_state_dict(dict(state), theirs, max_shard_size=200)
    save_sharded(state, ours, max_shard_size=200, force_contiguous=True, shared="keep_one")
    assert entries(ours) == entries(theirs)
    assert len(entries(ours)) > 3
    ours_index, theirs_index = (
        json.loads((directory / "model.safetensors.index.json").read_text()) for directory in (ours, theirs)
    )
    assert ours_index["weight_map"] == theirs_index["weight_map"]
    assert ours_index["metadata"]["total_size"] == theirs_index["metadata"]["total_size"]
    for name in entries(ours):
        if name.endswith(".safetensors"):
            (our_header, our_data), (their_header, their_data) = (
                unpack((directory / name).read_bytes()) for directory in (ours, theirs)
            )
            assert our_data == their_data
            # As docs/migrating.md says, they record dropped names in the index, and we in each file.
            ours_noted, theirs_noted = (json.loads(header).pop("__metadata__") for header in (our_header, their_header))
            noted = {key: value for key, value in theirs_index["metadata"].items() if key != "total_size"}
            assert ours_noted == {**theirs_noted, **noted}


def test_save_model_does_the_same(tmp_path: Path) -> None:
    model = Tied()
    save_model(model, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == save(model.state_dict(), shared="keep_one", force_contiguous=True)


class _Reordered(OrderedDict):
    """A dict that another thread reorders whenever its values are read."""

    def values(self):  # type: ignore[no-untyped-def]
        self.move_to_end(next(iter(self)))
        return super().values()


def test_a_dict_that_is_reordered_during_a_save() -> None:
    """Each name is saved with its own tensor."""
    tensors = _Reordered((str(i), torch.full((2,), float(i))) for i in range(5))
    for _ in range(3):
        assert all(tensor.tolist() == [float(name)] * 2 for name, tensor in load(save(tensors)).items())
