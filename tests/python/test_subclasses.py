"""Subclasses of Tensor: those with ordinary memory are saved as tensors, without __torch_function__; others refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from safetensors_torch import (
    IncrementalWriter,
    SafetensorError,
    load,
    load_file,
    load_model,
    load_sharded,
    save,
    save_file,
    save_model,
    save_sharded,
)
from support import encode

VALUES = torch.arange(6.0).reshape(2, 3)
SEEN: list[Any] = []


class Plain(torch.Tensor):
    pass


class Other(torch.Tensor):
    pass


class Logged(torch.Tensor):
    """A subclass that observes calls, and expects functions of torch."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class Dispatched(torch.Tensor):
    """A subclass with memory and a __torch_dispatch__."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(func)
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "last_error" not in str(func):
            SEEN.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


def of(kind: type, values: torch.Tensor = VALUES) -> torch.Tensor:
    return values.clone().as_subclass(kind)


def sharded(tensors: dict[str, torch.Tensor], directory: Path) -> dict[str, torch.Tensor]:
    save_sharded(tensors, directory, max_shard_size=10)
    return load_sharded(directory)


def file(tensors: dict[str, torch.Tensor], directory: Path) -> dict[str, torch.Tensor]:
    save_file(tensors, directory / "file")
    return load_file(directory / "file")


def writer(tensors: dict[str, torch.Tensor], directory: Path) -> dict[str, torch.Tensor]:
    with IncrementalWriter(directory / "written", tensors) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return load_file(directory / "written")


SAVES = {"save": lambda tensors, directory: load(save(tensors)), "file": file, "sharded": sharded, "writer": writer}


@pytest.fixture(params=SAVES)
def saved(request: pytest.FixtureRequest) -> Callable[..., dict[str, torch.Tensor]]:
    """Saves tensors with one of the functions, and loads them."""
    return SAVES[request.param]


@pytest.mark.parametrize("kinds", [[Plain], [Plain, Other], [Logged], [Dispatched], [Plain, Logged, Other, Dispatched]])
def test_ordinary_memory_is_saved(kinds: list[type], saved: Callable, tmp_path: Path) -> None:
    tensors = {f"t{i}": of(kind) for i, kind in enumerate(kinds)}
    tensors["parameter"] = torch.nn.Parameter(of(Logged))
    SEEN.clear()
    loaded = saved(tensors, tmp_path)
    assert SEEN == []
    assert loaded.keys() == tensors.keys()
    assert all(type(tensor) is torch.Tensor and torch.equal(tensor, VALUES) for tensor in loaded.values())


def test_a_mode_does_not_see_a_save(tmp_path: Path) -> None:
    with Watching():
        save({"a": VALUES, "b": of(Plain)})
        save_file({"a": VALUES, "b": of(Plain)}, tmp_path / "file", force_contiguous=True)
    assert [seen for seen in SEEN if "PendingSave" in str(seen) or "safetensors" in str(seen)] == []


@pytest.mark.parametrize("kind", [Logged, Dispatched])
def test_copies_before_a_save_are_not_seen(kind: type) -> None:
    views = {"packed": of(kind).t(), "negative": torch.complex(VALUES, VALUES).conj().imag.as_subclass(kind)}
    assert views["negative"].is_neg()
    SEEN.clear()
    data = save(views, force_contiguous=True)
    assert SEEN == []
    assert data == encode({"packed": VALUES.t().contiguous(), "negative": -VALUES})


@pytest.mark.parametrize("kind", [Plain, Logged])
def test_modules(kind: type, tmp_path: Path) -> None:
    def module(value: float) -> torch.nn.Module:
        module = torch.nn.Linear(2, 2)
        module.weight = torch.nn.Parameter(torch.full((2, 2), value).as_subclass(kind))
        module.register_buffer("mean", torch.full((2,), value).as_subclass(Other))
        return module

    save_model(module(1.0), tmp_path / "model")
    assert load_file(tmp_path / "model")["weight"].tolist() == [[1, 1], [1, 1]]
    target = module(0.0)
    assert load_model(target, tmp_path / "model") == (set(), [])
    assert target.weight.tolist() == [[1, 1], [1, 1]]
    assert target.mean.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        save_file({"weight": torch.ones(3), "bias": torch.ones(2), "mean": torch.ones(2)}, tmp_path / "model")
        load_model(target, tmp_path / "model")
    assert target.weight.tolist() == [[1, 1], [1, 1]]


def test_wrappers_without_memory_are_refused(saved: Callable, tmp_path: Path) -> None:
    pair = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(SafetensorError) as caught:
        saved({"plain": VALUES, "layer.pair": pair}, tmp_path)
    text = str(caught.value)
    assert "'layer.pair'" in text
    assert "TwoTensor" in text
    assert "`.a`, `.b`" in text
    assert [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("file")] == []


def test_a_wrapper_of_many_processes_is_refused(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import DeviceMesh, DTensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        tensor = DTensor.from_local(torch.ones(2), DeviceMesh("cpu", [0]))
        with pytest.raises(SafetensorError, match=r"'a' is a .*DTensor.*`\.full_tensor\(\)`"):
            save({"a": tensor})
        assert load(save({"a": tensor.full_tensor()}))["a"].tolist() == [1, 1]
    finally:
        distributed.destroy_process_group()


def test_order_of_the_checks() -> None:
    """The error about missing memory is the last one about tensors, as for meta tensors."""
    pair = TwoTensor(torch.ones(2), torch.ones(2))
    for other, error, text in (
        (VALUES.to_sparse(), ValueError, "sparse"),
        (VALUES.t(), ValueError, "contiguous"),
        (VALUES.to("meta"), RuntimeError, "meta"),
        ([1.0], ValueError, "torch.Tensor"),
    ):
        with pytest.raises(error, match=text):
            save({"pair": pair, "other": other})
    with pytest.raises(SafetensorError, match="TwoTensor"):
        save({"pair": pair, 7: VALUES})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout: torch.layout, saved: Callable, tmp_path: Path) -> None:
    """They have no single shape, so no file can hold them; the remedies in the text work."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=layout)
    with pytest.raises(ValueError, match="tensor 'n'.* nested") as caught:
        saved({"n": nested}, tmp_path)
    assert "sparse" not in str(caught.value)
    if layout is torch.jagged:
        loaded = load(save({"values": nested.values(), "offsets": nested.offsets()}))
        again = torch.nested.nested_tensor_from_jagged(loaded["values"], loaded["offsets"])
        assert [part.tolist() for part in again.unbind()] == [[1, 1], [0, 0, 0]]
    padded = nested.to_padded_tensor(0.0)
    assert torch.equal(load(save({"n": padded}))["n"], padded)


def test_the_error_has_the_full_name_of_the_class() -> None:
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, shape: tuple[int, ...]) -> Wrapper:
            return torch.Tensor._make_wrapper_subclass(cls, shape)

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"sees {func}")

    with pytest.raises(SafetensorError, match=re.escape(f"{__name__}.{Wrapper.__qualname__}, which has no memory")):
        save({"a": Wrapper((2, 3))})
