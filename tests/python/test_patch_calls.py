"""The reference's names while patch_safetensors is on: calls, files of every framework, and errors."""

from __future__ import annotations

import inspect
import pickle
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

import safetensors_torch
from malformed_files import MALFORMED, VALID
from patching import FUNCTIONS, is_unpatched
from safetensors_torch import patch_safetensors, unpatch_safetensors


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    assert is_unpatched()
    yield
    assert is_unpatched()


@pytest.fixture
def patched() -> Iterator[None]:
    with patch_safetensors():
        yield


def takes_all_of(ours: inspect.Signature, theirs: inspect.Signature) -> bool:
    """Returns whether each call that fits ``theirs`` means the same to ``ours``. A default of Rust is an Ellipsis."""
    positional = [p for p in theirs.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = list(ours.parameters.values())
    for index, theirs_parameter in enumerate(theirs.parameters.values()):
        parameter = ours.parameters.get(theirs_parameter.name)
        if parameter is None or parameter.kind is not theirs_parameter.kind:
            return False
        if index < len(positional) and own[index] is not parameter:
            return False
        if theirs_parameter.default not in (parameter.default, ..., theirs_parameter.empty):
            return False
    required = [p.name for p in own if p.default is p.empty]
    return set(required) <= {p.name for p in theirs.parameters.values() if p.default is p.empty}


@pytest.mark.parametrize("name", [*FUNCTIONS, "safe_open"])
def test_signatures_take_what_the_reference_takes(name: str, reference: types.SimpleNamespace, patched: None) -> None:
    theirs = inspect.signature(getattr(reference, name))
    assert len(theirs.parameters) >= 1
    assert takes_all_of(inspect.signature(getattr(safetensors.torch, name)), theirs)


def test_the_comparison_of_signatures_detects_differences() -> None:
    def signature(source: str) -> inspect.Signature:
        return inspect.signature(eval(f"lambda {source}: None"))

    theirs = signature("a, b=1, *, c='x'")
    assert takes_all_of(signature("a, b=1, d=2, *, c='x', e=3"), theirs)
    for other in ["b=1, a=0, *, c='x'", "a, *, b=1, c='x'", "a, b=2, *, c='x'", "a, b=1", "a, b=1, *, c='x', e"]:
        assert not takes_all_of(signature(other), theirs), other


CALLS = {
    "by position": lambda st, path, tensors, model: (
        st.save_file(tensors, path, {"a": "b"}),
        st.load_file(path, "cpu"),
        st.save(tensors, {"a": "b"}),
        st.load(path.read_bytes()),
        st.save_model(model, str(path), {"a": "b"}, False),
        st.load_model(model, path, True, "cpu"),
        st.safe_open(path, "pt", "cpu").keys(),
    ),
    "by name": lambda st, path, tensors, model: (
        st.save_file(tensors=tensors, filename=path, metadata=None),
        st.load_file(filename=path, device="cpu", backend="pread"),
        st.save(tensors=tensors, metadata=None),
        st.load(data=path.read_bytes()),
        st.save_model(model=model, filename=str(path), metadata=None, force_contiguous=True),
        st.load_model(model=model, filename=path, strict=False, device="cpu", backend="pread"),
        st.safe_open(filename=path, framework="pt", device="cpu", backend="pread").keys(),
    ),
}


def plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: (tensor.dtype, tensor.tolist()) for name, tensor in value.items()}
    return value


@pytest.mark.parametrize("how", CALLS)
def test_calls_return_what_the_reference_returns(how: str, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def results() -> list[object]:
        return [plain(value) for value in CALLS[how](safetensors.torch, tmp_path / "file", tensors, nn.Linear(3, 2))]

    theirs = results()
    with patch_safetensors():
        assert results() == theirs


def test_functions_can_be_pickled(patched: None, reference: types.SimpleNamespace) -> None:
    for name in FUNCTIONS:
        data = pickle.dumps(getattr(safetensors.torch, name))
        assert pickle.loads(data) is getattr(safetensors.torch, name)
        unpatch_safetensors()
        try:
            assert pickle.loads(data) is getattr(reference, name)
        finally:
            patch_safetensors()  # which the fixture undoes


# --- safe_open


@pytest.mark.parametrize("framework", ["np", "numpy"])
def test_other_frameworks_are_the_references(
    framework: str, backend: str, path: Path, reference: types.SimpleNamespace, patched: None
) -> None:
    with safetensors.safe_open(path, framework, backend=backend) as file:
        assert type(file) is reference.safe_open
        assert isinstance(file, safetensors.safe_open)
        assert isinstance(file.get_tensor("weight"), numpy.ndarray)


@pytest.mark.parametrize("framework", ["pt", "torch", "pytorch"])
def test_torch_is_ours(framework: str, path: Path, reference: types.SimpleNamespace, patched: None) -> None:
    with safetensors.safe_open(path, framework=framework) as file:
        assert isinstance(file, safetensors_torch.safe_open)
        assert isinstance(file, safetensors.safe_open)
        assert not isinstance(file, reference.safe_open)
        assert isinstance(file.get_tensor("weight"), torch.Tensor)
    assert isinstance(safetensors_torch.safe_open(path), safetensors.safe_open)
    assert not isinstance(path, safetensors.safe_open)


def test_the_error_about_an_absent_tensor_is_the_references(
    path: Path, reference: types.SimpleNamespace, patched: None
) -> None:
    texts = []
    for opener in (reference.safe_open, safetensors.safe_open):
        with opener(path, framework="pt") as file, pytest.raises(safetensors.SafetensorError) as caught:
            file.get_tensor("wieght")
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_file_may_have_the_name_of_an_index(path: Path, patched: None) -> None:
    path = path.rename(path.with_suffix(".json"))
    with safetensors.safe_open(path, framework="pt") as file:
        assert "weight" in file.keys()


def test_a_slice_is_true(tmp_path: Path, patched: None) -> None:
    safetensors.torch.save_file({"a": torch.zeros(0), "b": torch.tensor(1)}, tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.get_slice("a") and file.get_slice("b")


def test_a_pickle_is_of_the_references_name(path: Path, reference: types.SimpleNamespace, patched: None) -> None:
    with safetensors.safe_open(path, "pt") as file:
        data = pickle.dumps(file)
    assert isinstance(pickle.loads(data), safetensors_torch.safe_open)
    unpatch_safetensors()
    try:
        assert type(pickle.loads(data)) is reference.safe_open
    finally:
        patch_safetensors()  # which the fixture undoes


def test_a_class_that_derives_from_safe_open(path: Path, patched: None) -> None:
    class Mine(safetensors.safe_open):
        pass

    assert isinstance(Mine(path, "pt"), Mine)
    assert not isinstance(safetensors.safe_open(path, "pt"), Mine)


def test_unknown_frameworks_are_refused_as_by_the_reference(
    path: Path, reference: types.SimpleNamespace, patched: None
) -> None:
    for framework in ("PT", "", 3, None):
        with pytest.raises((safetensors.SafetensorError, TypeError)) as theirs:
            reference.safe_open(path, framework)
        with pytest.raises(theirs.type) as caught:
            safetensors.safe_open(path, framework)
        assert str(caught.value) == str(theirs.value)


def test_modules_for_other_frameworks_work(tmp_path: Path, patched: None) -> None:
    safetensors.numpy.save_file({"a": numpy.arange(3)}, tmp_path / "file")
    assert safetensors.numpy.load_file(tmp_path / "file")["a"].tolist() == [0, 1, 2]


def test_a_file_without_tensors_is_true(tmp_path: Path, patched: None) -> None:
    safetensors.torch.save_file({}, tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert len(file) == 0
        assert file


# --- errors


def test_the_references_class_catches_ours_wherever_it_is_stored() -> None:
    class Holder:
        error = safetensors.SafetensorError

    several = (OSError, safetensors.SafetensorError)
    with patch_safetensors():
        for caught in (safetensors.SafetensorError, Holder.error, several):
            for load in (safetensors.torch.load, safetensors_torch.load):
                with pytest.raises(caught) as error:
                    load(b"")
                assert type(error.value) is safetensors_torch.SafetensorError
        # The errors of the reference itself.
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load(b"")
        assert type(pickle.loads(pickle.dumps(error.value))) is safetensors_torch.SafetensorError
    with pytest.raises(safetensors_torch.SafetensorError) as error:
        safetensors_torch.load(b"")
    assert not isinstance(error.value, safetensors.SafetensorError)


# The reference has other texts for elements that end within a byte, and for these files.
OTHER_WORDS = {"twice-name-disjoint", "foreign-gzip"}


def test_header_errors_begin_as_the_references_do(tmp_path: Path, reference: types.SimpleNamespace) -> None:
    """Programs recognise a damaged file by this text, and fetch it again."""
    ours = {}
    for case in MALFORMED:
        (tmp_path / case.id).write_bytes(case.data)
    with patch_safetensors():
        for case in MALFORMED:
            with pytest.raises(safetensors.SafetensorError) as error:
                safetensors.torch.load_file(tmp_path / case.id)
            ours[case.id] = str(error.value)
            assert ours[case.id].startswith("Error while deserializing header: "), case.id
    compared = 0
    for case in MALFORMED:
        path = tmp_path / case.id
        try:
            reference.load_file(path)
        except safetensors.SafetensorError as error:
            # The rest is the JSON parser's, or the name of a tensor, which our text has elsewhere.
            phrase = re.match(r"Error while deserializing header: [^:`]+", str(error))[0].rstrip()
            is_comparable = case.id not in OTHER_WORDS and "byte boundary" not in phrase
            assert not is_comparable or ours[case.id].startswith(f"{phrase}: {path}: "), case.id
            compared += is_comparable
        except (TypeError, RuntimeError):
            continue
    assert compared > 150


def test_every_load_has_the_references_phrase(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(VALID[:-1])
    phrase = "Error while deserializing header: incomplete metadata, file not fully covered: "
    with pytest.raises(safetensors_torch.SafetensorError) as unpatched:
        safetensors_torch.load_file(path)
    with patch_safetensors():
        for load in (
            lambda: safetensors.torch.load_file(path),
            lambda: safetensors.safe_open(path, "pt"),
            lambda: safetensors.torch.load_model(nn.Linear(1, 1), path),
        ):
            with pytest.raises(safetensors.SafetensorError) as error:
                load()
            assert str(error.value) == f"{phrase}{unpatched.value}"
            assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
        with pytest.raises(safetensors.SafetensorError, match=f"^{phrase}"):
            safetensors.torch.load(VALID[:-1])


def test_other_errors_have_no_header_phrase(tmp_path: Path, path: Path, patched: None) -> None:
    for call in (
        lambda: safetensors.torch.load_file(path, backend="guess"),
        lambda: safetensors.safe_open(path, "pt").get_tensor("gone"),
        lambda: safetensors.torch.save_file({"__metadata__": torch.ones(1)}, tmp_path / "new"),
    ):
        with pytest.raises(safetensors.SafetensorError) as error:
            call()
        assert "deserializing" not in str(error.value)


def test_classes_of_both_errors() -> None:
    class OursFirst(safetensors_torch.SafetensorError, safetensors.SafetensorError):
        pass

    with patch_safetensors():
        assert issubclass(OursFirst, safetensors_torch.SafetensorError)
    del OursFirst


def test_a_patch_that_fails_changes_nothing() -> None:
    class TheirsFirst(safetensors.SafetensorError, safetensors_torch.SafetensorError):
        pass

    with pytest.raises(TypeError, match="order"):
        patch_safetensors()
    assert is_unpatched()
    unpatch_safetensors()
    assert is_unpatched()
    # No later patch may see it.
    TheirsFirst.__bases__ = (safetensors_torch.SafetensorError,)


def test_without_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        patch_safetensors()
    monkeypatch.undo()
    assert is_unpatched()


@pytest.mark.parametrize("wrong", [{"test": {"some": "thing"}}, {"a;b": 3}, "no dict", None])
def test_errors_about_what_cannot_be_saved_have_the_text_of_the_reference(wrong: object, tmp_path: Path) -> None:
    def text() -> str:
        with pytest.raises(ValueError) as caught:
            safetensors.torch.save_file(wrong, tmp_path / "file")
        return str(caught.value)

    theirs = text()
    with patch_safetensors():
        assert text() == theirs
