"""load_model with assign=True: the parameters and buffers of a module, on meta or not, are made from the file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from random_state import difference
from safetensors_torch import load_model, save_file, save_model
from support import Tied, snapshot


@pytest.fixture(autouse=True)
def no_warning() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Scaled(nn.Parameter):
    """A class of parameters with an attribute."""

    scale: int


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def test_the_remedy_in_the_error_works_for_tied_weights(tmp_path: Path, backend: str) -> None:
    source = Tied()
    save_model(source, tmp_path / "a")
    model = on_meta(Tied)
    with pytest.raises(RuntimeError, match=r"`\S+` is on the meta device .* Pass assign=True") as caught:
        load_model(model, tmp_path / "a", backend=backend)
    (remedy,) = (word for word in str(caught.value).replace(",", " ").split() if "=" in word)
    name, _, value = remedy.partition("=")
    assert load_model(model, tmp_path / "a", backend=backend, **{name: value == "True"}) == (set(), [])  # type: ignore[arg-type]
    assert model.head.weight is model.embedding.weight
    assert difference(snapshot(model), snapshot(source)) is None
    assert all(isinstance(value, nn.Parameter) and value.requires_grad for value in model.parameters())
    model.head(torch.ones(1, 4)).sum().backward()
    assert model.embedding.weight.grad is not None


def test_dtype_of_the_file_and_the_rest_of_the_module(write: Callable[..., Path], backend: str) -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    model[0].weight = Scaled(model[0].weight)
    model[0].weight.scale = 7
    model[0].bias.requires_grad_(False)
    state = {name: torch.full(value.shape, 2).to(torch.bfloat16) for name, value in model.state_dict().items()}
    state["1.num_batches_tracked"] = torch.tensor(5)
    assert load_model(model, write(state), backend=backend, assign=True) == (set(), [])
    assert difference(snapshot(model), state) is None
    weight = model[0].weight
    assert type(weight) is Scaled and weight.scale == 7 and weight.requires_grad and weight.is_leaf
    assert type(model[0].bias) is nn.Parameter and not model[0].bias.requires_grad
    assert type(model[1].running_mean) is torch.Tensor and "running_mean" in model[1]._buffers


def test_a_module_with_memory(write: Callable[..., Path], backend: str) -> None:
    model = nn.Linear(2, 2)
    old, before = model.weight, model.weight.detach().clone()
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    assert load_model(model, write(state), backend=backend, assign=True) == (set(), [])
    assert model.weight is not old and torch.equal(old, before)
    assert difference(snapshot(model), state) is None


@pytest.mark.parametrize("kept", ["embedding.weight", "head.weight"])
@pytest.mark.parametrize("meta", [False, True])
def test_ties_of_the_module(kept: str, meta: bool, write: Callable[..., Path]) -> None:
    state = {kept: torch.arange(28.0).reshape(7, 4), "norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}
    model = on_meta(Tied) if meta else Tied()
    assert load_model(model, write(state), assign=True) == (set(), [])
    assert model.head.weight is model.embedding.weight and torch.equal(model.head.weight, state[kept])


def test_both_names_of_a_tie_in_the_file(write: Callable[..., Path], backend: str) -> None:
    """As for a copy: one name is unexpected, and the last in the module's order counts."""
    state = {**snapshot(Tied()), "head.weight": torch.zeros(7, 4), "embedding.weight": torch.ones(7, 4)}
    copied, assigned = Tied(), on_meta(Tied)
    expected = load_model(copied, write(state), strict=False, backend=backend)
    assert load_model(assigned, write(state), strict=False, backend=backend, assign=True) == expected
    assert assigned.head.weight is assigned.embedding.weight
    assert difference(snapshot(assigned), snapshot(copied)) is None


def test_ties_in_the_metadata_of_the_file(tmp_path: Path) -> None:
    source = Tied()
    save_model(source, tmp_path / "a")
    model = on_meta(Tied)
    model.head.weight = nn.Parameter(torch.empty(7, 4, device="meta"))
    assert load_model(model, tmp_path / "a", assign=True) == (set(), [])
    assert model.head.weight is model.embedding.weight
    # Metadata that is unrelated text, or names other shapes, ties nothing.
    for text in ({"head.weight": "format"}, {"head.weight": "norm.weight"}, {"head.weight": "head.weight"}):
        save_file({k: v for k, v in snapshot(source).items() if k != "head.weight"}, tmp_path / "b", text)
        model = on_meta(Tied)
        model.head.weight = nn.Parameter(torch.empty(7, 4, device="meta"))
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.weight"$'):
            load_model(model, tmp_path / "b", assign=True)
        assert model.norm.weight.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_that_share_memory_and_are_not_one(device: str, write: Callable[..., Path]) -> None:
    whole = torch.zeros(3, 4, device=device)
    model = nn.Module()
    model.whole, model.same, model.part = nn.Parameter(whole), nn.Parameter(whole), nn.Parameter(whole[1:, ::2])
    values = torch.arange(12.0).reshape(3, 4)
    assert load_model(model, write({"whole": values}), assign=True) == (set(), [])
    assert torch.equal(model.whole, values) and torch.equal(model.part, values[1:, ::2])
    assert model.whole is not model.same
    with torch.no_grad():
        model.same.fill_(9)
    assert bool((model.whole == 9).all()) and bool((model.part == 9).all())


def test_a_part_of_a_tensor_that_is_not_contiguous(write: Callable[..., Path]) -> None:
    whole = torch.zeros(3, 4).t()
    model = nn.Module()
    model.part, model.whole = nn.Parameter(whole[1:]), nn.Parameter(whole)
    with pytest.raises(RuntimeError, match="`part`.* part of `whole`, which is not contiguous"):
        load_model(model, write({"whole": torch.ones(4, 3)}), assign=True)
    assert model.whole.data_ptr() == whole.data_ptr()


def test_a_failed_load_leaves_the_module(write: Callable[..., Path], backend: str) -> None:
    for make in (lambda: on_meta(lambda: nn.Linear(2, 2)), lambda: nn.Linear(2, 2)):
        model = make()
        held = [model.weight, model.bias]
        for state, text in (
            ({"weight": torch.ones(2, 2)}, "Missing key"),
            ({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, "size mismatch for bias"),
            ({"weight": torch.ones(2, 2), "bias": torch.ones(2), "x": torch.ones(3)}, "Unexpected key"),
            ({"weight": torch.ones(2, 2), "bias": torch.ones(2, dtype=torch.int8)}, "int8 to the parameter `bias`"),
        ):
            with pytest.raises(RuntimeError, match=text):
                load_model(model, write(state), backend=backend, assign=True)
            assert model.weight is held[0] and model.bias is held[1]


def test_integers_for_a_parameter_without_gradient(write: Callable[..., Path]) -> None:
    model = on_meta(lambda: nn.Linear(2, 2)).requires_grad_(False)
    state = {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)}
    assert load_model(model, write(state), assign=True) == (set(), [])
    assert type(model.weight) is nn.Parameter and model.weight.dtype == torch.int8


def test_non_persistent_buffers_on_meta_are_warned_about(write: Callable[..., Path]) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), nn.Module())
        model[1].register_buffer("inv_freq", torch.ones(2), persistent=False)
        model[1].register_buffer("saved", torch.ones(2))
        return model

    model = on_meta(make)
    given = write(snapshot(make()))
    with pytest.warns(UserWarning, match=r"persistent=False.*: 1\.inv_freq\. ") as caught:
        assert load_model(model, given, assign=True) == (set(), [])
    assert caught[0].filename == __file__
    assert model[1].inv_freq.is_meta and not model[1].saved.is_meta
    assert load_model(make(), given, assign=True) == (set(), [])


def test_missing_names_stay_on_meta(write: Callable[..., Path]) -> None:
    model = on_meta(lambda: nn.Linear(2, 2))
    assert load_model(model, write({"weight": torch.ones(2, 2)}), strict=False, assign=True) == ({"bias"}, [])
    assert model.bias.is_meta and not model.weight.is_meta


class Doubling(nn.Linear):
    def _load_from_state_dict(self, state: dict, prefix: str, *rest: object) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, *rest)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([3])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.extra = state


def test_hooks_and_methods_are_called(tmp_path: Path, backend: str) -> None:
    source, calls = nn.Sequential(Doubling(2, 2)), []
    options = {"prefix": "m.", "rename": lambda name: "x" + name}
    save_model(source, tmp_path / "a", **options)
    model = on_meta(lambda: nn.Sequential(Doubling(2, 2)))
    model.register_load_state_dict_post_hook(lambda *arguments: calls.append(arguments))
    assert load_model(model, tmp_path / "a", backend=backend, assign=True, **options) == (set(), [])
    assert torch.equal(model[0].weight, source[0].weight * 2) and len(calls) == 1 and model[0].extra.item() == 3


def test_lazy_modules(write: Callable[..., Path]) -> None:
    model = nn.LazyLinear(2)
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    assert load_model(model, write(state), assign=True) == (set(), [])
    assert difference(snapshot(model), state) is None


@pytest.mark.parametrize("value", [1, "yes", None])
def test_flags(value: object, write: Callable[..., Path]) -> None:
    for name in ("assign", "backup"):
        with pytest.raises(TypeError, match=f"{name} must be a bool"):
            load_model(nn.Linear(1, 1), write({}), **{name: value})  # type: ignore[arg-type]
