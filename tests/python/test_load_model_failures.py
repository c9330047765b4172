"""load_model: errors in the words of load_state_dict, after which the module is as it was, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from random_state import difference
from safetensors_torch import SafetensorError, load_model
from support import DTYPES, encode, sample, snapshot


def plain() -> nn.Module:
    """A model with 0.bias, 0.weight, 2.bias, 2.weight, in the order of names and of offsets."""
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))


def with_pre_hook() -> nn.Module:
    model = plain()
    model.register_load_state_dict_pre_hook(lambda module, state, *rest: None)
    return model


def with_post_hook() -> nn.Module:
    model = plain()
    model[0].register_load_state_dict_post_hook(lambda module, incompatible: None)
    return model


def with_state_dict_hook() -> nn.Module:
    """A model whose state_dict returns copies of its tensors."""

    def copied(module: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
        for name in list(state):
            state[name] = state[name].clone()

    model = plain()
    model.register_state_dict_post_hook(copied)
    return model


class OwnLoader(nn.Linear):
    def _load_from_state_dict(self, state: dict, prefix: str, *rest: object) -> None:
        super()._load_from_state_dict(state, prefix, *rest)


class OwnLoadStateDict(nn.Sequential):
    def load_state_dict(self, state: dict, strict: bool = True, assign: bool = False) -> object:
        return super().load_state_dict(state, strict, assign)


def with_own_loader() -> nn.Module:
    return nn.Sequential(OwnLoader(3, 3), nn.ReLU(), nn.Linear(3, 3))


def with_own_load_state_dict() -> nn.Module:
    return OwnLoadStateDict(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


def tied() -> nn.Module:
    model = plain()
    model[2].weight = model[0].weight
    return model


KINDS = {
    make.__name__: make
    for make in (
        plain,
        with_batch_norm,
        with_pre_hook,
        with_post_hook,
        with_state_dict_hook,
        with_own_loader,
        with_own_load_state_dict,
        tied,
    )
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def state_of(make: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """Other values for such a model, under the kept names, so that any value that is loaded is visible."""
    dropped = ["2.weight"] if make is tied else []
    return {name: torch.full_like(value, 9) for name, value in snapshot(make()).items() if name not in dropped}


def without_last(state: dict) -> dict:
    return {name: value for name, value in state.items() if name != "2.bias"}


def with_another(state: dict) -> dict:
    return {**state, "another": torch.ones(2)}


def with_last_too_large(state: dict) -> dict:
    return {**state, "2.bias": torch.ones(4)}


def with_last_of_other_rank(state: dict) -> dict:
    return {**state, "2.bias": torch.ones(3, 1)}


def with_several_of_other_shapes(state: dict) -> dict:
    return {**state, "0.bias": torch.ones(3, 3), "2.bias": torch.ones(0)}


def with_all_faults(state: dict) -> dict:
    return {**without_last(state), "0.bias": torch.ones(5), "another": torch.ones(2)}


def unconvertible(state: dict) -> dict:
    return {**state, "2.bias": sample(DTYPES["F4"], (3,))}


NAME_FAULTS = (without_last, with_another)
SHAPE_FAULTS = (with_last_too_large, with_last_of_other_rank, with_several_of_other_shapes)


def load_refused(model: nn.Module, given: Path, strict: bool, backend: str) -> str:
    """Returns the text of the error. The model must have its former tensors and values."""
    before, held = snapshot(model), [*model.parameters(), *model.buffers()]
    with pytest.raises(RuntimeError) as caught:
        load_model(model, given, strict=strict, backend=backend)
    assert difference(snapshot(model), before) is None
    assert all(now is then for now, then in zip([*model.parameters(), *model.buffers()], held, strict=True))
    return str(caught.value)


@every_kind
@pytest.mark.parametrize("damage", NAME_FAULTS, ids=lambda damage: damage.__name__)
def test_names_that_do_not_fit(make: Callable, damage: Callable, write: Callable[..., Path], backend: str) -> None:
    model = make()
    message = load_refused(model, write(damage(state_of(make))), True, backend)
    if damage is without_last:
        expected = 'Missing key(s) in state_dict: "2.bias"'
    else:
        expected = 'Unexpected key(s) in state_dict: "another"'
    assert message == f"Error(s) in loading state_dict for {type(model).__name__}:\n    {expected}"


@every_kind
@pytest.mark.parametrize("damage", SHAPE_FAULTS, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_do_not_fit(
    make: Callable, damage: Callable, strict: bool, write: Callable[..., Path], backend: str
) -> None:
    state = damage(state_of(make))
    with pytest.raises(RuntimeError, match="size mismatch for 2.bias") as expected:
        make().load_state_dict(state, strict=False)
    assert load_refused(make(), write(state), strict, backend) == str(expected.value)


@every_kind
@pytest.mark.parametrize("strict", [True, False])
def test_all_faults_at_once(make: Callable, strict: bool, write: Callable[..., Path], backend: str) -> None:
    message = load_refused(make(), write(with_all_faults(state_of(make))), strict, backend)
    assert (
        "\n\tsize mismatch for 0.bias: copying a param with shape torch.Size([5]) from checkpoint, "
        "the shape in current model is torch.Size([3])." in message
    )


@every_kind
@pytest.mark.skipif("F4" not in DTYPES, reason="this torch has no float4")
def test_a_dtype_that_torch_cannot_convert(make: Callable, write: Callable[..., Path], backend: str) -> None:
    assert "2.bias" in load_refused(make(), write(unconvertible(state_of(make))), True, backend)


@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("with_hook", [False, True])
def test_one_dimension_for_a_scalar(length: int, with_hook: bool, write: Callable[..., Path], backend: str) -> None:
    """As load_state_dict does, which refused more in older versions of torch."""
    model, theirs = nn.Module(), nn.Module()
    model.scalar, theirs.scalar = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(2.0))
    if with_hook:
        model.register_load_state_dict_pre_hook(lambda *arguments: None)
    state = {"scalar": torch.arange(5.0, 5.0 + length)}
    try:
        theirs.load_state_dict(state)
    except RuntimeError as error:
        assert load_refused(model, write(state), True, backend) == str(error)
    else:
        assert load_model(model, write(state), backend=backend) == (set(), [])
        assert model.scalar.item() == theirs.scalar.item()


@every_kind
def test_the_undamaged_model_loads(make: Callable, write: Callable[..., Path], backend: str) -> None:
    model = make()
    assert load_model(model, write(state_of(make)), backend=backend) == (set(), [])
    assert all(bool((value == 9).all()) for value in snapshot(model).values())


@every_kind
@pytest.mark.parametrize("cut", [4, 100, -1], ids=["length", "header", "data"])
def test_malformed_file(make: Callable, cut: int, write: Callable[..., Path], backend: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(SafetensorError):
        load_model(model, write(encode(state_of(make))[:cut]), backend=backend)
    assert difference(snapshot(model), before) is None


@every_kind
def test_missing_file(make: Callable, tmp_path: Path, backend: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError):
        load_model(model, tmp_path / "absent", backend=backend)
    assert difference(snapshot(model), before) is None


class RaisesAtTheEnd(nn.Linear):
    def _load_from_state_dict(self, *arguments: object) -> None:
        super()._load_from_state_dict(*arguments)
        raise LookupError("not today")


def test_a_loader_that_raises(write: Callable[..., Path], backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), RaisesAtTheEnd(3, 3))
    before = snapshot(model)
    with pytest.raises(LookupError, match="not today"):
        load_model(model, write(state_of(plain)), backend=backend)
    assert difference(snapshot(model), before) is None


class WithUnwritable(nn.Linear):
    """A copy into its buffer raises, because one element stands for three."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("expanded", torch.zeros(1).expand(3), persistent=False)


def test_a_failed_restore_keeps_the_first_error(write: Callable[..., Path], backend: str) -> None:
    model = nn.Sequential(WithUnwritable(), nn.ReLU(), RaisesAtTheEnd(3, 3))
    before = snapshot(model)
    with pytest.raises(LookupError, match="not today") as caught:
        load_model(model, write(state_of(plain)), backend=backend)
    assert not hasattr(caught.value, "__notes__")
    assert difference(snapshot(model), before) is None


class ForgetsHowToGoBack(RaisesAtTheEnd):
    """Its extra state cannot be set, and a tensor that load_state_dict changed becomes read-only."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("expanded", torch.zeros(1).expand(3), persistent=False)

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: object) -> None:
        raise ArithmeticError("no way back")

    def _load_from_state_dict(self, *arguments: object) -> None:
        self.expanded[0] = 5
        super()._load_from_state_dict(*arguments)


def test_a_restore_continues_after_an_error(write: Callable[..., Path], backend: str) -> None:
    model = nn.Sequential(ForgetsHowToGoBack(), nn.ReLU(), nn.Linear(3, 3))
    before = {name: value for name, value in snapshot(model).items() if name != "0._extra_state"}
    with pytest.raises(LookupError, match="not today") as caught:
        load_model(model, write(state_of(plain)), strict=False, backend=backend)
    if hasattr(caught.value, "add_note"):
        (note,) = caught.value.__notes__
        assert "written-to tensor" in note and "no way back" in note
    assert difference({name: model.state_dict()[name] for name in before}, before) is None


def test_a_restore_undoes_changes_through_data(write: Callable[..., Path], backend: str) -> None:
    """torch's version counters do not count such a change."""
    model = with_pre_hook()
    before = snapshot(model)

    def write_and_raise(*arguments: object) -> None:
        model[0].weight.data.fill_(5)
        raise LookupError("not today")

    model.register_load_state_dict_pre_hook(write_and_raise)
    with pytest.raises(LookupError, match="not today"):
        load_model(model, write(state_of(plain)), backend=backend)
    assert difference(snapshot(model), before) is None


def test_a_restore_does_not_write_unchanged_tensors(write: Callable[..., Path], backend: str) -> None:
    """Tensors that autograd has saved remain valid."""
    model = with_pre_hook()
    model[0].bias.data.fill_(float("nan"))
    loss = model[2](torch.ones(3)).pow(2).sum()
    versions = [parameter._version for parameter in model.parameters()]

    def refuse(*arguments: object) -> None:
        raise LookupError("not today")

    model.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(LookupError, match="not today"):
        load_model(model, write(state_of(plain)), backend=backend)
    assert [parameter._version for parameter in model.parameters()] == versions
    loss.backward()


def test_no_name_covers_the_memory(write: Callable[..., Path], backend: str) -> None:
    shared = torch.zeros(10)
    model = nn.Module()
    model.left, model.right = nn.Parameter(shared[:6]), nn.Parameter(shared[2:8])
    message = load_refused(model, write({"left": torch.ones(6), "right": torch.ones(6)}), True, backend)
    assert "cover" in message.lower()
    assert "left" in message and "right" in message


META = {
    "whole": lambda: nn.Linear(3, 3, device="meta"),
    "a part": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta")),
    "a buffer": lambda: nn.BatchNorm1d(3, affine=False, device="meta"),
    "with a hook": lambda: with_pre_hook().to("meta"),
}


@pytest.mark.parametrize("make", META.values(), ids=META)
@pytest.mark.parametrize("strict", [True, False])
def test_meta_model(make: Callable, strict: bool, write: Callable[..., Path], backend: str) -> None:
    model = make()
    names = [name for name, value in model.state_dict().items() if not value.is_meta]
    before = {name: model.state_dict()[name].clone() for name in names}
    state = {name: torch.full(value.shape, 9, dtype=value.dtype) for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"\bmeta\b"):
        load_model(model, write(state), strict=strict, backend=backend)
    assert difference({name: model.state_dict()[name] for name in names}, before) is None


def test_an_expanded_buffer_is_refused_before_anything_changes(write: Callable[..., Path], backend: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.zeros(1).expand(3))
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "mask": torch.ones(3)}
    assert "mask" in load_refused(model, write(state), True, backend)
