"""load_model: what it returns, what it writes into a module's tensors, tied weights.

Failed loads are in test_load_model_failures.py, hooks and methods of a module's own in test_load_model_hooks.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import safetensors_torch._model
from random_state import difference
from safetensors_torch import load_model, save_model
from support import DTYPES, Tied, sample, snapshot


def holding(**tensors: torch.Tensor) -> nn.Module:
    """A module with these tensors as its parameters."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


@pytest.mark.parametrize("kind", [str, Path, os.fsencode], ids=["str", "PathLike", "bytes"])
def test_path_kinds(kind: Callable, write: Callable[..., Path], backend: str) -> None:
    source, model = nn.Linear(3, 4), nn.Linear(3, 4)
    assert load_model(model, kind(write(snapshot(source))), backend=backend) == (set(), [])
    assert difference(snapshot(model), snapshot(source)) is None


def test_result_is_a_set_and_a_list(write: Callable[..., Path], backend: str) -> None:
    given = write({"weight": torch.ones(2, 2), "z": torch.ones(1), "y": torch.ones(1)})
    missing, unexpected = load_model(nn.Linear(2, 2), given, strict=False, backend=backend)
    assert type(missing) is set and type(unexpected) is list
    assert missing == {"bias"}
    assert sorted(unexpected) == ["y", "z"]


STRICT = {
    "missing": ({"weight": (2, 2)}, 'Missing key(s) in state_dict: "bias"'),
    "missing two": ({}, 'Missing key(s) in state_dict: "bias", "weight"'),
    "unexpected": ({"weight": (2, 2), "bias": (2,), "x": (1,)}, 'Unexpected key(s) in state_dict: "x"'),
    "unexpected two": (
        {"weight": (2, 2), "bias": (2,), "x": (1,), "B": (2,)},
        'Unexpected key(s) in state_dict: "B", "x"',
    ),
    "both": (
        {"z": (9,), "x": (1,)},
        'Missing key(s) in state_dict: "bias", "weight"\n    Unexpected key(s) in state_dict: "x", "z"',
    ),
}


@pytest.mark.parametrize("shapes, text", STRICT.values(), ids=STRICT)
@pytest.mark.parametrize("options", [{}, {"strict": True}], ids=["default", "True"])
def test_strict_error(shapes: dict, text: str, options: dict, write: Callable[..., Path], backend: str) -> None:
    given = write({name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(RuntimeError) as caught:
        load_model(nn.Linear(2, 2), given, backend=backend, **options)
    assert str(caught.value) == f"Error(s) in loading state_dict for Linear:\n    {text}"


def test_error_names_the_class_of_the_whole_model(write: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match=r"^Error\(s\) in loading state_dict for Tied:\n    Missing key"):
        load_model(Tied(), write({}))


def test_not_strict_loads_the_common_names(write: Callable[..., Path], backend: str) -> None:
    model = nn.Linear(2, 2)
    bias = model.bias.detach().clone()
    load_model(model, write({"weight": torch.full((2, 2), 5.0)}), strict=False, backend=backend)
    assert model.weight.tolist() == [[5, 5], [5, 5]]
    assert torch.equal(model.bias, bias)


def test_the_parameters_stay_the_same_objects(write: Callable[..., Path], backend: str) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    weight, pointer, grad = model.weight, model.weight.data_ptr(), model.weight.grad.clone()
    load_model(model, write({"weight": torch.full((2, 2), 5.0), "bias": torch.zeros(2)}), backend=backend)
    assert model.weight is weight and isinstance(weight, nn.Parameter)
    assert weight.data_ptr() == pointer
    assert weight.is_leaf and weight.requires_grad and not model.bias.requires_grad
    assert torch.equal(weight.grad, grad)
    assert weight.tolist() == [[5, 5], [5, 5]]


def test_plain_modules_are_loaded_directly(
    write: Callable[..., Path], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not load the tensors of the file into a dict first."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a detour")

    monkeypatch.setattr(nn.Module, "load_state_dict", refuse)
    monkeypatch.setattr(safetensors_torch._model, "load_opened", refuse)
    source, model = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Tied()) for _ in range(2))
    state = snapshot(source)
    del state["2.head.weight"]
    assert load_model(model, write(state), backend=backend) == (set(), [])
    assert difference(snapshot(model), snapshot(source)) is None


def test_autograd_notices_the_change(write: Callable[..., Path], backend: str) -> None:
    """As load_state_dict does if a backward pass still needs the tensor."""
    model = nn.Linear(2, 2)
    values = torch.ones(1, 2, requires_grad=True)
    result = model(values).sum()
    load_model(model, write({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_the_model_does_not_keep_the_file(write: Callable[..., Path], backend: str) -> None:
    model = nn.Linear(2, 2)
    given = write({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    load_model(model, given, backend=backend)
    with torch.no_grad():
        model.weight.add_(1)
    with given.open("r+b") as file:
        file.write(bytes(given.stat().st_size))
    assert model.weight.tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("source", ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_converted(source: str, target: torch.dtype, write: Callable[..., Path], backend: str) -> None:
    values = torch.tensor([0.0, 1, 1, 0, 1]) if source == "BOOL" else torch.tensor([0.0, 1, 3, 7, 12])
    model = holding(a=torch.zeros(5, dtype=target))
    assert load_model(model, write({"a": values.to(DTYPES[source])}), backend=backend) == (set(), [])
    assert model.a.dtype == target
    assert torch.equal(model.a, values.to(target))


def test_conversion_rounds_as_copy_does(write: Callable[..., Path], backend: str) -> None:
    values = torch.linspace(-70000, 70000, 999, dtype=torch.float64)
    model = holding(f16=torch.zeros(999).half(), i32=torch.zeros(999, dtype=torch.int32))
    load_model(model, write({"f16": values, "i32": values}), backend=backend)
    assert torch.equal(model.f16, values.half())
    assert torch.equal(model.i32, values.int())


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_into_its_own(code: str, write: Callable[..., Path], backend: str) -> None:
    values = {"a": sample(DTYPES[code], (3, 4))}
    model = holding(a=torch.zeros(3, 4 * DTYPES[code].itemsize, dtype=torch.uint8).view(DTYPES[code]))
    load_model(model, write(values), backend=backend)
    assert difference(snapshot(model), values) is None


LAYOUTS = {
    "transposed": lambda: torch.zeros(3, 2).t(),
    "permuted": lambda: torch.zeros(4, 2, 3).permute(2, 0, 1),
    "channels last": lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("source", [torch.float32, torch.float16], ids=str)
def test_layout_of_the_parameter_is_kept(
    make: Callable, source: torch.dtype, write: Callable[..., Path], backend: str
) -> None:
    model = holding(a=make())
    strides, pointer = model.a.stride(), model.a.data_ptr()
    values = torch.arange(model.a.numel(), dtype=source).reshape(model.a.shape)
    assert load_model(model, write({"a": values}), backend=backend) == (set(), [])
    assert torch.equal(model.a, values.float())
    assert (model.a.stride(), model.a.data_ptr()) == (strides, pointer)


def test_scalars_and_zero_size(write: Callable[..., Path], backend: str) -> None:
    model = holding(scalar=torch.tensor(0.0), none=torch.zeros(0, 3), old=torch.tensor(0.0))
    # Files from before torch 0.4 store scalars as one element; load_state_dict accepts them.
    values = {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "old": torch.tensor([7.0])}
    assert load_model(model, write(values), backend=backend) == (set(), [])
    assert (model.scalar.item(), model.old.item(), model.old.shape) == (2.5, 7.0, torch.Size([]))


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("saved", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_buffers(write: Callable[..., Path], backend: str) -> None:
    model = WithBuffers()
    assert load_model(model, write({"saved": torch.ones(3)}), backend=backend) == (set(), [])
    assert model.saved.tolist() == [1, 1, 1]
    assert model.cache.tolist() == [0, 0]


def test_non_persistent_buffers_are_unexpected(write: Callable[..., Path], backend: str) -> None:
    model = WithBuffers()
    given = write({"saved": torch.ones(3), "cache": torch.ones(2)})
    assert load_model(model, given, strict=False, backend=backend) == (set(), ["cache"])
    assert model.cache.tolist() == [0, 0]


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm], ids=lambda make: make.__name__)
def test_batch_norm_without_its_counter(make: type, write: Callable[..., Path], backend: str) -> None:
    """Files from before torch 0.4.1 lack it."""
    model = nn.Sequential(make(2))
    model[0].num_batches_tracked.fill_(41)
    state = {name: torch.full((2,), 3.0) for name in snapshot(model) if "num_batches" not in name}
    assert load_model(model, write(state), backend=backend) == (set(), [])
    assert model[0].num_batches_tracked.item() == 41
    assert model[0].running_mean.tolist() == [3, 3]


def test_batch_norm_with_its_counter(write: Callable[..., Path], backend: str) -> None:
    source, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    source(torch.ones(3, 2))
    assert load_model(model, write(snapshot(source)), backend=backend) == (set(), [])
    assert model.num_batches_tracked.item() == 1
    assert difference(snapshot(model), snapshot(source)) is None


def test_another_modules_counter_is_missed(write: Callable[..., Path], backend: str) -> None:
    model = nn.Module()
    model.register_buffer("num_batches_tracked", torch.tensor(0))
    assert load_model(model, write({}), strict=False, backend=backend) == ({"num_batches_tracked"}, [])


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_either_of_two_tied_names_suffices(name: str, write: Callable[..., Path], backend: str) -> None:
    """For either name that the writer of the file kept."""
    state = {name: torch.arange(28.0).reshape(7, 4), "norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}
    model = Tied()
    assert load_model(model, write(state), backend=backend) == (set(), [])
    assert torch.equal(model.head.weight, state[name])
    assert model.embedding.weight is model.head.weight


def test_of_tied_names_that_are_absent_one_is_missing(write: Callable[..., Path], backend: str) -> None:
    state = {"norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}
    assert load_model(Tied(), write(state), strict=False, backend=backend) == ({"embedding.weight"}, [])
    with pytest.raises(RuntimeError) as caught:
        load_model(Tied(), write(state), backend=backend)
    assert str(caught.value).endswith('for Tied:\n    Missing key(s) in state_dict: "embedding.weight"')


@pytest.mark.parametrize("embedding_first", [False, True])
def test_both_tied_names_in_the_file(
    embedding_first: bool, write: Callable[..., Path], backend: str, reference
) -> None:
    """save_model never writes both names; if a file has both, the dropped one is unexpected.

    The memory then holds what the model names last, wherever in the file that lies.
    """
    state = {**snapshot(Tied()), "head.weight": torch.zeros(7, 4), "embedding.weight": torch.ones(7, 4)}
    order = sorted(state, reverse=not embedding_first)
    given = write({name: state[name] for name in order})
    theirs, ours = Tied(), Tied()
    expected = reference.load_model(theirs, given, strict=False)
    assert expected == (set(), ["head.weight"])
    assert load_model(ours, given, strict=False, backend=backend) == expected
    assert torch.equal(ours.head.weight, theirs.head.weight)


BASE = torch.arange(12.0)


@pytest.mark.parametrize("kept", ["a", "b", "c"])
def test_three_tied_names(kept: str, write: Callable[..., Path], backend: str) -> None:
    shared = torch.zeros(12)
    model = holding(c=shared, a=shared, b=shared)
    assert load_model(model, write({kept: BASE}), backend=backend) == (set(), [])
    assert torch.equal(model.a, BASE) and torch.equal(model.b, BASE) and torch.equal(model.c, BASE)


def test_a_part_of_the_kept_tensor_follows_it(write: Callable[..., Path], backend: str) -> None:
    shared = torch.zeros(12)
    model = holding(a=shared[2:5], whole=shared)
    assert load_model(model, write({"whole": BASE}), backend=backend) == (set(), [])
    assert model.a.tolist() == [2, 3, 4]


def test_one_module_in_two_places(write: Callable[..., Path], backend: str) -> None:
    inner = nn.Linear(2, 2)
    model = nn.Sequential(inner, nn.ReLU(), inner)
    state = {"0.weight": torch.full((2, 2), 4.0), "0.bias": torch.full((2,), 5.0)}
    assert load_model(model, write(state), backend=backend) == (set(), [])
    assert difference(snapshot(inner), {"weight": state["0.weight"], "bias": state["0.bias"]}) is None


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 2, 2)),
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
    "attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
    "instance norm": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    "tied": Tied,
    "double": lambda: nn.Linear(3, 2).double(),
    "no state": nn.ReLU,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_saved_models_load(make: Callable, tmp_path: Path, backend: str, reference) -> None:
    source, model, theirs = make(), make(), make()
    save_model(source, tmp_path / "a")
    assert load_model(model, tmp_path / "a", backend=backend) == (set(), [])
    assert reference.load_model(theirs, tmp_path / "a") == (set(), [])
    assert difference(snapshot(model), snapshot(source)) is None
    assert difference(snapshot(model), snapshot(theirs)) is None


def test_a_checkpoint_without_files(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    assert load_model(torch.nn.Identity(), index) == (set(), [])
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(torch.nn.Linear(2, 2), index)
