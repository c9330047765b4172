"""patch_safetensors and unpatch_safetensors: what they replace, where, how often, and what they restore."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import safetensors_torch
from patching import BEFORE, FUNCTIONS, MODULES, is_unpatched
from safetensors_torch import _patch, patch_safetensors, unpatch_safetensors


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    assert is_unpatched()
    yield
    assert is_unpatched()


@pytest.fixture
def patched() -> Iterator[None]:
    with patch_safetensors():
        yield


@pytest.fixture
def new_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], types.ModuleType]:
    """Creates a loaded module from its source."""

    def make(name: str, source: str) -> types.ModuleType:
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, vars(module))
        return module

    return make


USE = """
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file as write, load_file, safe_open as opener
import safetensors.torch as st
"""


def expect_reference(module: types.ModuleType, reference: types.SimpleNamespace) -> None:
    assert module.write is reference.save_file
    assert module.load_file is reference.load_file
    assert module.safe_open is module.opener is reference.safe_open


def expect_ours(module: types.ModuleType) -> None:
    assert module.write is safetensors.torch.save_file
    assert module.load_file is safetensors.torch.load_file
    assert module.safe_open is module.opener is safetensors.safe_open
    assert issubclass(module.safe_open, safetensors_torch.safe_open)


# --- what is replaced, and where


def test_these_names_and_no_others_are_replaced(patched: None) -> None:
    changed = [
        {name for name in vars(module) if vars(module)[name] is not before.get(name)}
        for module, before in zip(MODULES, BEFORE, strict=True)
    ]
    classes = {"safe_open", "PrefetchLoader", "PySafeSlice", "TensorMeta"}
    assert changed == [classes, {"safe_open", *FUNCTIONS}, set(), set()]


def test_classes_that_the_reference_lacks_are_added(path: Path, patched: None) -> None:
    with safetensors.safe_open(path, "pt") as file:
        assert isinstance(file.prefetch(), safetensors.PrefetchLoader)
        assert isinstance(file.get_slice("weight"), safetensors.PySafeSlice)
        assert isinstance(file.get_tensor_meta("weight"), safetensors.TensorMeta)
        assert not isinstance(file, safetensors.PrefetchLoader)
        with pytest.raises(safetensors.SafetensorError, match="File does not contain tensor nope$"):
            file.prefetch({"nope": None})


def test_classes_that_the_reference_has_are_replaced(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    class PrefetchLoader:
        pass

    monkeypatch.setattr(safetensors, "PrefetchLoader", PrefetchLoader, raising=False)
    with patch_safetensors(), safetensors.safe_open(path, "pt") as file:
        assert safetensors.PrefetchLoader is not PrefetchLoader
        assert isinstance(file.prefetch(), safetensors.PrefetchLoader)
        assert isinstance(PrefetchLoader(), safetensors.PrefetchLoader)
    assert safetensors.PrefetchLoader is PrefetchLoader
    monkeypatch.undo()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_ours(name: str, patched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_torch, name, lambda *args, **kwargs: (args, kwargs))
    assert getattr(safetensors.torch, name)(1, "b", c=3) == ((1, "b"), {"c": 3})


def test_a_module_that_was_imported_before(new_module: Callable, reference: types.SimpleNamespace) -> None:
    module = new_module("user_before", USE)
    expect_reference(module, reference)
    with patch_safetensors():
        expect_ours(module)
    expect_reference(module, reference)


def test_a_module_that_is_imported_while_patched(new_module: Callable, reference: types.SimpleNamespace) -> None:
    with patch_safetensors():
        module = new_module("user_meanwhile", USE)
        expect_ours(module)
    expect_reference(module, reference)


def test_the_main_module(monkeypatch: pytest.MonkeyPatch, reference: types.SimpleNamespace) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "my_save", safetensors.torch.save, raising=False)
    with patch_safetensors():
        assert sys.modules["__main__"].my_save is safetensors.torch.save is not reference.save
    assert sys.modules["__main__"].my_save is reference.save


def test_a_module_that_is_unloaded_while_patched(new_module: Callable, reference: types.SimpleNamespace) -> None:
    module = new_module("user_unloaded", USE)
    with patch_safetensors():
        del sys.modules["user_unloaded"]
        expect_ours(module)
    expect_reference(module, reference)


def test_changes_of_a_module_while_patched_stay(new_module: Callable) -> None:
    module = new_module("user_changes", USE)
    with patch_safetensors():
        module.write = print
        del module.load_file
    assert module.write is print
    assert not hasattr(module, "load_file")


def test_modules_that_use_ours_by_its_name_keep_it(new_module: Callable) -> None:
    with patch_safetensors():
        module = new_module("user_of_ours", "from safetensors_torch import safe_open, save_file as write")
    assert module.write is safetensors_torch.save_file
    assert module.safe_open is safetensors_torch.safe_open


def test_lazy_modules_are_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(types.ModuleType):
        def __getattribute__(self, name: str) -> object:
            raise AssertionError(f"{name} was asked for")

    monkeypatch.setitem(sys.modules, "odd_lazy", Lazy("odd_lazy"))
    monkeypatch.setitem(sys.modules, "odd_none", None)
    monkeypatch.setitem(sys.modules, "odd_class", Lazy)
    monkeypatch.setitem(sys.modules, "odd_object", object())
    with patch_safetensors():
        assert not is_unpatched()


# --- how often


def test_without_a_with_block() -> None:
    patch_safetensors()
    try:
        assert not is_unpatched()
    finally:
        unpatch_safetensors()
    assert is_unpatched()


def test_patches_nest() -> None:
    patch_safetensors()
    inside = safetensors.torch.load_file
    with patch_safetensors():
        assert safetensors.torch.load_file is inside
    assert safetensors.torch.load_file is inside
    patch_safetensors()
    unpatch_safetensors()
    assert safetensors.torch.load_file is inside
    unpatch_safetensors()
    assert is_unpatched()


def test_an_extra_unpatch_does_nothing() -> None:
    unpatch_safetensors()
    with patch_safetensors():
        assert not is_unpatched()
        unpatch_safetensors()
        assert is_unpatched()
    with patch_safetensors():
        assert not is_unpatched()


def test_an_error_in_the_block_comes_through() -> None:
    with pytest.raises(KeyError, match="mine"), patch_safetensors():
        raise KeyError("mine")
    assert is_unpatched()


def test_a_patch_is_good_for_one_block() -> None:
    once = patch_safetensors()
    with once:
        assert not is_unpatched()
    with pytest.raises(RuntimeError, match="patch_safetensors"), once:
        pass
    assert is_unpatched()


def test_somebody_elses_replacement_is_restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def other(*args: object) -> None:
        raise AssertionError("should be replaced")

    with monkeypatch.context() as context:
        context.setattr(safetensors.torch, "save_file", other)
        with patch_safetensors():
            safetensors.torch.save_file({}, tmp_path / "file")
        assert vars(safetensors.torch)["save_file"] is other


def test_a_name_of_ours_that_is_assigned_again_is_not_the_reference(reference: types.SimpleNamespace) -> None:
    with patch_safetensors():
        kept = safetensors.torch.load_file
    safetensors.torch.load_file = kept
    with patch_safetensors():
        assert safetensors.torch.load_file is kept
    assert safetensors.torch.load_file is reference.load_file


def test_threads(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "file"
    safetensors.torch.save_file(tensors, path)
    faults = []

    def work() -> None:
        try:
            for _ in range(10):
                with patch_safetensors():
                    if is_unpatched():
                        faults.append("not patched inside of the block")
                    assert set(safetensors.torch.load_file(path)) == set(tensors)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert is_unpatched()


def test_two_threads_do_not_patch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the second would take the replacements of the first for the reference, or see half of them."""
    applied = []
    apply = _patch._apply

    def slowly() -> None:
        applied.append("begin")
        time.sleep(0.05)
        apply()
        applied.append("end")

    monkeypatch.setattr(_patch, "_apply", slowly)
    threads = [threading.Thread(target=patch_safetensors) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert applied == ["begin", "end"]
    for _ in threads:
        assert not is_unpatched()
        unpatch_safetensors()
