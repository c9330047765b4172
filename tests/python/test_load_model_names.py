"""load_model and save_model with names that differ between module and file: prefix, rename, and what wrappers add."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from random_state import difference
from safetensors_torch import load_file, load_model, save_model
from support import Tied, snapshot


def with_hook(model: nn.Module) -> nn.Module:
    """Makes load_model use load_state_dict."""
    model.register_load_state_dict_pre_hook(lambda *arguments: None)
    return model


WAYS = {
    "straight": lambda model: model,
    "with a hook": with_hook,
    "assign": lambda model: model,
    "assign to meta": lambda model: model.to("meta"),
}
every_way = pytest.mark.parametrize("way", WAYS)


def load(way: str, model: nn.Module, given: Path, **options: object) -> tuple[nn.Module, tuple]:
    model = WAYS[way](model)
    return model, load_model(model, given, assign=way.startswith("assign"), **options)  # type: ignore[arg-type]


@every_way
def test_prefix(way: str, write: Callable[..., Path], backend: str) -> None:
    source = nn.Linear(2, 3)
    state = {f"body.{name}": value for name, value in snapshot(source).items()}
    given = write({**state, "head.weight": torch.ones(1), "body": torch.ones(1)})
    model, result = load(way, nn.Linear(2, 3), given, prefix="body.", backend=backend)
    assert result == (set(), [])
    assert difference(snapshot(model), snapshot(source)) is None
    given = write({"body.weight": torch.ones(3, 2), "body.extra": torch.ones(1), "bias": torch.ones(3)})
    model, result = load(way, nn.Linear(2, 3), given, prefix="body.", backend=backend, strict=False)
    assert result == ({"body.bias"}, ["body.extra"])
    with pytest.raises(RuntimeError) as caught:
        load(way, nn.Linear(2, 3), given, prefix="body.", backend=backend)
    assert str(caught.value).splitlines()[1:] == [
        '    Missing key(s) in state_dict: "body.bias"',
        '    Unexpected key(s) in state_dict: "body.extra"',
    ]


@every_way
def test_rename(way: str, write: Callable[..., Path], backend: str) -> None:
    source = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    def rename(name: str) -> str:
        return (
            name.replace("0.", "linear.").replace("weight", "bias") if "weight" in name else name.replace("bias", "w")
        )

    state = {f"m.{rename(name)}": value for name, value in snapshot(source).items()}
    given = write({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")})
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model, result = load(way, model, given, prefix="m.", rename=rename, backend=backend)
    assert result == (set(), [])
    assert difference(snapshot(model), snapshot(source)) is None


@every_way
def test_rename_must_return_distinct_names(way: str, write: Callable[..., Path]) -> None:
    given = write({"x": torch.ones(2)})
    for call in (
        lambda: load(way, nn.Linear(2, 2), given, rename=lambda name: "x"),
        lambda: save_model(nn.Linear(2, 2), given, rename=lambda name: "x"),
    ):
        with pytest.raises(ValueError, match="two tensors of Linear are called x by `rename`"):
            call()


@pytest.mark.parametrize("options", [{"prefix": 1}, {"prefix": None}, {"rename": "a"}, {"rename": lambda name: 1}])
def test_other_names_are_refused(options: dict, write: Callable[..., Path]) -> None:
    given = write({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    for call in (load_model, save_model):
        with pytest.raises(TypeError):
            call(nn.Linear(2, 2), given, **options)
    assert load_file(given).keys() == {"weight", "bias"}


def test_a_file_name_that_another_tensor_has_in_the_module(write: Callable[..., Path], backend: str) -> None:
    """The name without the prefix is not taken for the tensor."""
    given = write({"w": torch.ones(2, 2), "bias": torch.zeros(2), "weight": torch.zeros(2, 2)})
    for way in ("straight", "with a hook", "assign"):
        model, result = load(
            way, nn.Linear(2, 2), given, rename=lambda name: name.replace("weight", "w"), strict=False, backend=backend
        )
        assert result == (set(), ["weight"])
        assert model.weight.tolist() == [[1, 1], [1, 1]]


@every_way
def test_a_module_is_saved_and_loaded_under_other_names(way: str, tmp_path: Path) -> None:
    source = Tied()
    options = {"prefix": "m.", "rename": lambda name: name.replace("weight", "w")}
    save_model(source, tmp_path / "a", {"k": "v"}, **options)
    assert all(name.startswith("m.") for name in load_file(tmp_path / "a"))
    assert "m.embedding.w" in load_file(tmp_path / "a") and "m.head.w" not in load_file(tmp_path / "a")
    model, result = load(way, Tied(), tmp_path / "a", **options)
    assert result == (set(), [])
    assert difference(snapshot(model), snapshot(source)) is None
    assert model.head.weight is model.embedding.weight


class Wrapped(nn.Module):
    """Wraps a module as torch.compile and DataParallel do, without their requirements."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        for name in names[1:]:
            model = Wrapped(model, name)
        self.add_module(names[0], model)


WRAPPERS = {
    "compiled": ("_orig_mod",),
    "parallel": ("module",),
    "both": ("module", "_orig_mod"),
    "the other way round": ("_orig_mod", "module"),
}
CAUSES = {"_orig_mod": "torch.compile", "module": "DataParallel"}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def bare(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")


def refusal(module: nn.Module, given: Path, **options: object) -> str:
    with pytest.raises(RuntimeError) as caught:
        load_model(module, given, **options)  # type: ignore[arg-type]
    return str(caught.value)


def advised(text: str) -> dict[str, object]:
    """Returns the options that an error advises."""
    options: dict[str, object] = {}
    if "in Python: " in text:
        code = text.partition("in Python: ")[2].partition(").\n")[0].rstrip().removesuffix(").")
        options.update(eval(f"dict({code})"))
    if 'the prefix "' in text:
        options["prefix"] = text.partition('the prefix "')[2].partition('"')[0]
    return options


@pytest.mark.parametrize("names", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("prefix", ["", "sub."])
def test_errors_about_wrappers_advise_what_works(names: tuple, hooked: bool, prefix: str, tmp_path: Path) -> None:
    plain, wrapped = model(), Wrapped(model(), *names)
    save_model(plain, tmp_path / "plain", prefix=prefix)
    save_model(wrapped, tmp_path / "wrapped", prefix=prefix)
    for target, given in ((wrapped, "plain"), (plain, "wrapped")):
        if hooked:
            with_hook(target)
        text = refusal(target, tmp_path / given, prefix=prefix)
        assert all(CAUSES[name] in text for name in names), text
        options = {"prefix": prefix, **advised(text)}
        assert load_model(target, tmp_path / given, **options) == (set(), [])  # type: ignore[arg-type]
        expected = {bare(name.removeprefix(prefix)): value for name, value in load_file(tmp_path / given).items()}
        assert difference({bare(name): value for name, value in snapshot(target).items()}, expected) is None


def test_wrappers_on_both_sides(tmp_path: Path) -> None:
    source, target = Wrapped(model(), "module"), Wrapped(model(), "_orig_mod")
    save_model(source, tmp_path / "a")
    text = refusal(target, tmp_path / "a")
    assert load_model(target, tmp_path / "a", **advised(text)) == (set(), [])  # type: ignore[arg-type]
    assert torch.equal(target._orig_mod[0].weight, source.module[0].weight)


def test_a_part_that_is_compiled(tmp_path: Path) -> None:
    """Names with a wrapper in the middle."""
    source, target = model(), model()
    source[0] = Wrapped(source[0], "_orig_mod")
    save_model(source, tmp_path / "a")
    text = refusal(target, tmp_path / "a")
    assert 'a `rename` that makes "0._orig_mod.bias" of "0.bias"' in text
    assert load_model(target, tmp_path / "a", rename=lambda name: name.replace("0.", "0._orig_mod.")) == (set(), [])
    save_model(target, tmp_path / "b")
    assert load_model(source, tmp_path / "b", **advised(refusal(source, tmp_path / "b"))) == (set(), [])


def test_real_wrappers(tmp_path: Path) -> None:
    plain = model()
    for wrapped in (torch.compile(model()), nn.DataParallel(model())):
        save_model(plain, tmp_path / "a")
        text = refusal(wrapped, tmp_path / "a")
        assert load_model(wrapped, tmp_path / "a", **advised(text)) == (set(), [])
        save_model(wrapped, tmp_path / "b")
        assert load_model(plain, tmp_path / "b", **advised(refusal(plain, tmp_path / "b"))) == (set(), [])


def test_other_differences_have_no_advice(write: Callable[..., Path]) -> None:
    for state in ({"module.other": torch.ones(2)}, {"submodule.weight": torch.ones(2, 2)}, {"x": torch.ones(1)}):
        text = refusal(nn.Linear(2, 2), write(state))
        assert "Parallel" not in text and len(text.splitlines()) == 3
