"""Tensors whose storage is too small, or changes while they are loaded or saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from safetensors_torch import (
    IncrementalWriter,
    SafetensorError,
    _progress,
    load_file,
    load_model,
    save,
    save_file,
    save_model,
    save_sharded,
)
from support import as_tensor, encode, entries, snapshot

ops = torch.ops.safetensors_torch


class State(nn.Module):
    """A module with these tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def with_hook(module: nn.Module) -> nn.Module:
    module.register_load_state_dict_pre_hook(lambda *args: None)
    return module


def resized(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def too_small() -> dict[str, torch.Tensor]:
    """Tensors of 40 elements whose storages are too small for them."""
    return {
        "freed": resized(torch.ones(40), 0),
        "shrunk": resized(torch.ones(40), 159),
        "an offset": resized(torch.ones(80)[40:], 319),
        "gaps": resized(torch.ones(80)[::2], 0),
        "transposed": resized(torch.ones(8, 5).t(), 100),
        "half": resized(torch.ones(40, dtype=torch.float16), 40),
    }


KINDS = list(too_small())
SAVES: dict[str, Callable[[dict[str, torch.Tensor], Path], Any]] = {
    "save_file": save_file,
    "save": lambda tensors, path: save(tensors),
    "save_model": lambda tensors, path: save_model(State(**tensors), path),
    "save_sharded": lambda tensors, path: save_sharded(tensors, path.parent),
    "ops.save_file": lambda tensors, path: ops.save_file(tensors, str(path)),
    "ops.save": lambda tensors, path: ops.save(tensors),
    "ops.save_tensors": lambda tensors, path: ops.save_tensors(str(path), list(tensors), list(tensors.values())),
}


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize("kind", ["freed", "shrunk", "an offset", "half"])
def test_a_save_refuses_a_storage_that_is_too_small(tmp_path: Path, kind: str, how: str) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="^tensor 'bad': its storage has .* gather them first"):
        SAVES[how]({"good": torch.ones(3), "bad": too_small()[kind]}, tmp_path / "f")
    assert entries(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["gaps", "transposed"])
def test_save_model_does_not_copy_beyond_a_storage(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeError, match="^tensor 'bad': its storage has"):
        save_model(State(good=torch.ones(3), bad=too_small()[kind]), tmp_path / "f")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("kind", ["freed", "shrunk", "an offset", "half"])
def test_a_writer_refuses_it_and_takes_another(tmp_path: Path, kind: str) -> None:
    bad = too_small()[kind]
    with IncrementalWriter(tmp_path / "f", {"bad": bad}) as writer:
        with pytest.raises(RuntimeError, match="^tensor 'bad': its storage has"):
            writer.write("bad", bad)
        writer.write("bad", torch.full_like(bad, 2))
    assert load_file(tmp_path / "f")["bad"].eq(2).all()


@pytest.mark.parametrize("wrap", [State, lambda **tensors: with_hook(State(**tensors))], ids=["plain", "hook"])
@pytest.mark.parametrize("kind", KINDS)
def test_load_model_refuses_a_storage_that_is_too_small(tmp_path: Path, kind: str, wrap: Callable) -> None:
    bad = too_small()[kind]
    model = wrap(a=torch.zeros(3), bad=bad, z=torch.zeros(3))
    (tmp_path / "f").write_bytes(encode({"a": torch.ones(3), "bad": torch.ones(bad.shape), "z": torch.ones(3)}))
    with pytest.raises(RuntimeError, match="^tensor 'bad': its storage has"):
        load_model(model, tmp_path / "f")
    assert model.a.eq(0).all() and model.z.eq(0).all()


def test_a_storage_that_is_just_large_enough(tmp_path: Path) -> None:
    part = resized(torch.arange(100.0)[10:50], 200)
    empty = resized(torch.ones(9)[5:5], 0)
    save_file({"part": part, "empty": empty}, tmp_path / "f")
    assert torch.equal(load_file(tmp_path / "f")["part"], torch.arange(10.0, 50.0))
    model = State(part=part.zero_(), empty=empty)
    load_model(model, tmp_path / "f")
    assert torch.equal(model.part, torch.arange(10.0, 50.0))


def test_bytes_that_were_shrunk() -> None:
    data = resized(as_tensor(save({"x": torch.ones(100)})), 100)
    with pytest.raises(RuntimeError, match="its storage has 100 bytes"):
        ops.load(data)


def test_a_zero_tensor(tmp_path: Path) -> None:
    zero = torch._efficientzerotensor((3, 2))
    expected = encode({"x": torch.zeros(3, 2)})
    assert save({"x": zero}) == expected
    save_model(State(x=zero), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == expected
    with pytest.raises(RuntimeError, match="x is a zero tensor, which is immutable"):
        load_model(State(x=zero), tmp_path / "f")


def grad(function: Callable) -> Callable:
    return torch.func.grad(lambda x: function(x).sum())


TRANSFORMS = {"functionalize": torch.func.functionalize, "vmap": torch.func.vmap, "grad": grad}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_tensor_in_a_transform_is_not_saved(tmp_path: Path, transform: Callable) -> None:
    def saved(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(SafetensorError, match="tensor 'x' has no memory of its own .* outside of the transform"):
            save_file({"x": x}, tmp_path / "f")
        return x * 2

    transform(saved)(torch.ones(2))
    assert entries(tmp_path) == []


def test_a_functional_tensor_is_loaded_as_copy_does(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(encode({"x": torch.full((2,), 5.0)}))

    def loaded(x: torch.Tensor) -> torch.Tensor:
        model = State(x=x + 1)
        load_model(model, tmp_path / "f")
        return model.x * 2

    assert torch.func.functionalize(loaded)(torch.ones(2)).tolist() == [10, 10]


def test_an_inference_tensor_is_written_in_inference_mode_only(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 2)
        before = snapshot(model)
    (tmp_path / "f").write_bytes(encode({"weight": torch.ones(2, 3), "bias": torch.ones(2)}))
    with pytest.raises(RuntimeError, match="weight is an inference tensor: in-place updates outside InferenceMode"):
        load_model(model, tmp_path / "f")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        load_model(model, tmp_path / "f")
    assert model.weight.eq(1).all() and model.bias.eq(1).all()


# Large enough that two steps of a save, of 64 MiB each, do not finish the last one.
COUNT, ELEMENTS = 4, 9 << 20


def free(tensor: torch.Tensor) -> None:
    resized(tensor, 0)


def shrink(tensor: torch.Tensor) -> None:
    resized(tensor, 100)


def replace(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(ELEMENTS)


def move(tensor: torch.Tensor) -> None:
    tensor.set_(tensor.untyped_storage(), 1, (ELEMENTS - 1,), (1,))


class Changing:
    """A progress function that changes a tensor once, and lets another one reuse its memory."""

    def __init__(self, tensor: torch.Tensor, change: Callable[[torch.Tensor], None]) -> None:
        self._tensor, self._change = tensor, change
        self.other: torch.Tensor | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.other is None:
            assert done < total
            self._change(self._tensor)
            self.other = torch.full((ELEMENTS,), 7.0)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "STEP_SECONDS", 0.0)


def many(value: float) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((ELEMENTS,), value) for i in range(COUNT)}


CHANGED = "^tensor 't3': its memory was freed, resized or replaced"


@pytest.mark.parametrize("change", [free, shrink])
@pytest.mark.parametrize("wrong_dtype", [False, True], ids=["straight", "converted"])
def test_a_parameter_that_changes_during_a_load(
    tmp_path: Path, short_steps: None, change: Callable, wrong_dtype: bool
) -> None:
    path = tmp_path / "f"
    save_file({name: tensor.half() if wrong_dtype else tensor for name, tensor in many(1.0).items()}, path)
    model = State(**many(0.0))
    changing = Changing(model.t3, change)
    with pytest.raises(RuntimeError, match=CHANGED):
        load_model(model, path, progress=changing)
    assert changing.other is not None and changing.other.eq(7).all()
    assert model.t3.untyped_storage().nbytes() in (0, 100)


def test_a_storage_lives_as_long_as_it_is_loaded_into(tmp_path: Path, short_steps: None) -> None:
    save_file(many(1.0), tmp_path / "f")
    model = State(**many(0.0))
    changing = Changing(model.t3, replace)
    load_model(model, tmp_path / "f", progress=changing)
    assert changing.other is not None and changing.other.eq(7).all()
    assert model.t3.eq(0).all() and model.t2.eq(1).all()


@pytest.mark.parametrize(
    ("how", "change"),
    [*(("save_file", change) for change in (free, shrink, replace, move)), ("save", free), ("save_sharded", free)],
)
def test_a_tensor_that_changes_during_a_save(tmp_path: Path, short_steps: None, how: str, change: Callable) -> None:
    tensors = many(1.0)
    (tmp_path / "f").write_bytes(b"old")
    calls = {
        "save_file": lambda progress: save_file(tensors, tmp_path / "f", progress=progress),
        "save": lambda progress: save(tensors, progress=progress),
        "save_sharded": lambda progress: save_sharded(
            tensors, tmp_path, max_shard_size=8 * ELEMENTS, progress=progress
        ),
    }
    with pytest.raises(RuntimeError, match=CHANGED):
        calls[how](Changing(tensors["t3"], change))
    assert entries(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"
