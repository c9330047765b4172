"""load_model with hooks, and with modules that have their own ways to load or to give their state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from random_state import difference
from safetensors_torch import _load_state_dict, load_model, save_model
from support import snapshot

STATE = {"0.weight": torch.full((2, 2), 4.0), "0.bias": torch.full((2,), 5.0), "1.bias": torch.full((2,), 6.0)}


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))


def model_of(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*(modules or (nn.Linear(2, 2), Bias())))


def loaded(model: nn.Module) -> bool:
    return difference(snapshot(model), STATE) is None


def rename(state: dict, old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name[len(old) :]] = state.pop(name)


def renamed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


@pytest.mark.parametrize("where", ["root", "child"])
def test_pre_hook_is_called(where: str, write: Callable[..., Path], backend: str) -> None:
    model, calls = model_of(), []
    hooked = model if where == "root" else model[1]

    def hook(module: nn.Module, state: dict, prefix: str, *rest: object) -> None:
        calls.append((module, prefix))
        state[prefix + "bias" if where == "child" else "1.bias"].add_(10)

    hooked.register_load_state_dict_pre_hook(hook)
    assert load_model(model, write(STATE), backend=backend) == (set(), [])
    assert calls == [(hooked, "" if where == "root" else "1.")]
    assert model[1].bias.tolist() == [16, 16]


def test_pre_hook_that_renames(write: Callable[..., Path], backend: str) -> None:
    model = model_of()
    model.register_load_state_dict_pre_hook(lambda module, state, *rest: rename(state, "old.", ""))
    assert load_model(model, write(renamed("old.")), backend=backend) == (set(), [])
    assert loaded(model)


def test_hook_registered_the_old_way(write: Callable[..., Path], backend: str) -> None:
    model = model_of()
    model._register_load_state_dict_pre_hook(lambda state, *rest: rename(state, "old.", ""))
    assert load_model(model, write(renamed("old.")), backend=backend) == (set(), [])
    assert loaded(model)


@pytest.mark.parametrize("where", ["root", "child"])
def test_post_hook_decides_what_is_missing(where: str, write: Callable[..., Path], backend: str) -> None:
    model = model_of()

    def forgive(module: nn.Module, incompatible: object) -> None:
        incompatible.missing_keys.clear()
        incompatible.unexpected_keys.clear()

    (model if where == "root" else model[1]).register_load_state_dict_post_hook(forgive)
    state = {"0.weight": STATE["0.weight"], "0.bias": STATE["0.bias"]}
    assert load_model(model, write(state), backend=backend) == (set(), [])
    assert model[0].weight.tolist() == [[4, 4], [4, 4]]


class Doubling(Bias):
    """A module that saves half of its values under another name."""

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, strict: bool, *lists: list) -> None:
        missing, unexpected, _ = lists
        value = state.get(prefix + "half")
        if value is None:
            missing.append(prefix + "half")
        else:
            self.bias.data.copy_(value * 2)
        unexpected.extend(name for name in state if name.startswith(prefix) and name != prefix + "half")


def test_own_loader_of_a_child(write: Callable[..., Path], backend: str) -> None:
    model = model_of(nn.Linear(2, 2), Doubling())
    state = {"0.weight": STATE["0.weight"], "0.bias": STATE["0.bias"], "1.half": torch.full((2,), 3.0)}
    missing, _ = load_model(model, write(state), strict=False, backend=backend)
    assert missing == set()
    assert loaded(model)


def test_own_loader_reports_missing_names(write: Callable[..., Path], backend: str) -> None:
    model = Doubling()
    assert load_model(model, write({}), strict=False, backend=backend) == ({"half"}, [])
    with pytest.raises(RuntimeError) as caught:
        load_model(model, write({"bias": torch.ones(2)}), backend=backend)
    assert str(caught.value) == (
        "Error(s) in loading state_dict for Doubling:"
        '\n    Missing key(s) in state_dict: "half"\n    Unexpected key(s) in state_dict: "bias"'
    )


def test_own_loader_of_an_instance(write: Callable[..., Path], backend: str) -> None:
    model = model_of()
    inner = model[1]._load_from_state_dict

    def tripled(state: dict, prefix: str, *rest: object) -> None:
        inner({prefix + "bias": state[prefix + "bias"] * 3}, prefix, *rest)

    model[1]._load_from_state_dict = tripled
    assert load_model(model, write(STATE), backend=backend) == (set(), [])
    assert model[1].bias.tolist() == [18, 18]


class Wrapper(nn.Module):
    """A module whose state is that of its inner module, without a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of()

    def state_dict(self, *arguments: object, **options: object) -> dict:
        return self.inner.state_dict(*arguments, **options)

    def load_state_dict(self, state: dict, strict: bool = True, assign: bool = False) -> object:
        return self.inner.load_state_dict(state, strict, assign)


def test_own_load_state_dict(tmp_path: Path, write: Callable[..., Path], backend: str) -> None:
    model, other = Wrapper(), Wrapper()
    assert load_model(model, write(STATE), backend=backend) == (set(), [])
    assert loaded(model.inner)
    save_model(model, tmp_path / "again")
    assert load_model(other, tmp_path / "again", backend=backend) == (set(), [])
    assert loaded(other.inner)


class OnlyLoads(nn.Sequential):
    """A module that overrides only the load."""

    def load_state_dict(self, state: dict, strict: bool = True, assign: bool = False) -> object:
        return super().load_state_dict({name: value * 2 for name, value in state.items()}, strict, assign)


def test_load_state_dict_that_changes_values(write: Callable[..., Path], backend: str) -> None:
    model = OnlyLoads(nn.Linear(2, 2), Bias())
    halves = {name: value / 2 for name, value in STATE.items()}
    assert load_model(model, write(halves), backend=backend) == (set(), [])
    assert loaded(model)


class SavesAll(nn.Sequential):
    """A module that overrides only the save."""

    def state_dict(self, *arguments: object, **options: object) -> dict:
        state = super().state_dict(*arguments, **options)
        for name in list(state):
            state[name] = state[name].clone()
        return state


class SavesCopies(Bias):
    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "bias"] = self.bias.detach().clone()


def hooked(register: str) -> nn.Module:
    def copied(module: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
        for name in list(state):
            state[name] = state[name].clone()

    model = model_of()
    getattr(model, register)(copied)
    return model


GIVE_COPIES = {
    "own state_dict": lambda: SavesAll(nn.Linear(2, 2), Bias()),
    "own _save_to_state_dict": lambda: model_of(nn.Linear(2, 2), SavesCopies()),
    "state_dict post-hook": lambda: hooked("register_state_dict_post_hook"),
    "state_dict hook of the old way": lambda: hooked("_register_state_dict_hook"),
}


@pytest.mark.parametrize("make", GIVE_COPIES.values(), ids=GIVE_COPIES)
def test_modules_whose_state_dict_is_a_copy(make: Callable, write: Callable[..., Path], backend: str) -> None:
    """Its state_dict does not return the parameters."""
    model = make()
    assert load_model(model, write(STATE), backend=backend) == (set(), [])
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert difference(parameters, STATE) is None


class WithExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.step = torch.tensor([0])

    def get_extra_state(self) -> torch.Tensor:
        return self.step.clone()

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.step = state.clone()


def test_extra_state(write: Callable[..., Path], backend: str) -> None:
    model = nn.Sequential(WithExtraState())
    state = {"0.weight": torch.ones(2), "0._extra_state": torch.tensor([7])}
    assert load_model(model, write(state), backend=backend) == (set(), [])
    assert model[0].step.tolist() == [7]
    assert model[0].weight.tolist() == [1, 1]


def test_extra_state_that_the_file_lacks(write: Callable[..., Path], backend: str) -> None:
    model = nn.Sequential(WithExtraState())
    given = write({"0.weight": torch.ones(2)})
    assert load_model(model, given, strict=False, backend=backend) == ({"0._extra_state"}, [])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\._extra_state"$'):
        load_model(model, given, backend=backend)


def test_extra_state_that_the_model_lacks(write: Callable[..., Path], backend: str) -> None:
    given = write({"bias": torch.ones(2), "_extra_state": torch.ones(1)})
    assert load_model(Bias(), given, strict=False, backend=backend) == (set(), ["_extra_state"])


def test_extra_state_is_restored_after_a_failure(write: Callable[..., Path], backend: str) -> None:
    model = nn.Sequential(WithExtraState(), nn.Linear(2, 2))
    before = snapshot(model)
    state = {**before, "0._extra_state": torch.tensor([7]), "1.bias": torch.ones(3)}
    with pytest.raises(RuntimeError, match="size mismatch for 1.bias"):
        load_model(model, write(state), backend=backend)
    assert difference(snapshot(model), before) is None


def test_tied_weights_with_a_hook(write: Callable[..., Path], backend: str, reference) -> None:
    """Tied names mean the same in a load through load_state_dict as in a direct load."""
    for name in ("0.weight", "1.weight"):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        model.register_load_state_dict_pre_hook(lambda module, state, *rest: None)
        given = write({name: torch.full((2, 2), 8.0)})
        assert load_model(model, given, backend=backend) == (set(), [])
        assert model[0].weight is model[1].weight
        assert model[0].weight.tolist() == [[8, 8], [8, 8]]
        given = write({"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)})
        expected = reference.load_model(model, given, strict=False)
        assert load_model(model, given, strict=False, backend=backend) == expected


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list:
    """The tensors that are copied for the backup."""
    copied, made = _load_state_dict._copied, []
    monkeypatch.setattr(_load_state_dict, "_copied", lambda tensor: made.append(tensor) or copied(tensor))
    return made


def with_pre_hook() -> nn.Module:
    model = model_of()
    model.register_load_state_dict_pre_hook(lambda *arguments: None)
    return model


def with_post_hook() -> nn.Module:
    model = model_of()
    model[1].register_load_state_dict_post_hook(lambda *arguments: None)
    return model


@pytest.mark.parametrize("make", [with_post_hook, *GIVE_COPIES.values()])
def test_no_backup_for_a_direct_load(make: Callable, write: Callable[..., Path], backend: str, copies: list) -> None:
    model = make()
    before = snapshot(model)
    for state in ({**STATE, "1.bias": torch.ones(3)}, {**STATE, "0.bias": torch.ones(2, 2)}):
        with pytest.raises(RuntimeError, match="size mismatch"):
            load_model(model, write(state), backend=backend)
    assert difference(snapshot(model), before) is None
    assert load_model(model, write(STATE), backend=backend) == (set(), [])
    assert loaded(model) and copies == []


def test_a_backup_if_a_hook_may_change_names(write: Callable[..., Path], backend: str, copies: list) -> None:
    model = with_post_hook()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_model(model, write({**STATE, "x": torch.ones(1)}), backend=backend)
    assert difference(snapshot(model), before) is None and len(copies) == 3


@pytest.mark.parametrize("make", [with_pre_hook, lambda: model_of(nn.Linear(2, 2), Doubling())])
def test_backup_can_be_disabled(make: Callable, write: Callable[..., Path], backend: str, copies: list) -> None:
    name, value = ("1.half", torch.full((2,), 3.0)) if isinstance(make()[1], Doubling) else ("1.bias", STATE["1.bias"])
    state = {"0.weight": STATE["0.weight"], "0.bias": STATE["0.bias"], name: value}
    model = make()
    load_model(model, write(state), strict=False, backend=backend, backup=False)
    assert loaded(model) and copies == []
    load_model(make(), write(state), strict=False, backend=backend)
    assert len(copies) == 3
    # Values that were loaded before the failure stay; the module's tensors stay the same objects.
    model = make()
    held = list(model.parameters())
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_model(model, write({**state, "0.bias": torch.ones(3)}), backend=backend, backup=False)
    assert model[0].weight.tolist() == [[4, 4], [4, 4]]
    assert all(now is then for now, then in zip(model.parameters(), held, strict=True))


def test_no_memory_for_a_backup(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not enough memory: you tried to allocate 16 bytes.")

    monkeypatch.setattr(_load_state_dict, "_copied", refuse)
    model = with_pre_hook()
    before = snapshot(model)
    with pytest.raises(MemoryError, match=r"the 32 bytes of Sequential \(.*tried to allocate.*\): pass backup=False"):
        load_model(model, write(STATE))
    assert difference(snapshot(model), before) is None
    assert load_model(model, write(STATE), backup=False) == (set(), [])
    assert loaded(model)


class Attributed(nn.Parameter):
    pass


def test_a_parameter_subclass_is_loaded_directly(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors_torch._model.load_opened", None)
    model = model_of()
    model[1].bias = Attributed(torch.zeros(2))
    assert load_model(model, write(STATE)) == (set(), [])
    assert loaded(model) and type(model[1].bias) is Attributed
