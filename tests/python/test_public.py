"""The package's public names, their signatures, and what type checkers see of them."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path

import pytest

import safetensors_torch

REQUIRED = inspect.Parameter.empty
# (name, default) of each parameter; those behind "*" by keyword only.
SIGNATURES = {
    "load_file": [
        ("filename", REQUIRED),
        ("device", "cpu"),
        "*",
        ("backend", "mmap"),
        ("prefault", None),
        ("dtype", None),
        ("names", None),
        ("progress", None),
        ("filesystem", None),
    ],
    "load": [
        ("data", REQUIRED),
        ("device", "cpu"),
        "*",
        ("copy", True),
        ("dtype", None),
        ("names", None),
        ("progress", None),
    ],
    "save_file": [
        ("tensors", REQUIRED),
        ("filename", REQUIRED),
        ("metadata", None),
        "*",
        ("force_contiguous", False),
        ("shared", "error"),
        ("durable", False),
        ("progress", None),
        ("filesystem", None),
    ],
    "save": [
        ("tensors", REQUIRED),
        ("metadata", None),
        "*",
        ("force_contiguous", False),
        ("shared", "error"),
        ("progress", None),
    ],
    "load_model": [
        ("model", REQUIRED),
        ("filename", REQUIRED),
        ("strict", True),
        ("device", "cpu"),
        "*",
        ("backend", "mmap"),
        ("prefix", ""),
        ("rename", None),
        ("assign", False),
        ("backup", True),
        ("variant", None),
        ("extra", "error"),
        ("progress", None),
        ("filesystem", None),
    ],
    "save_model": [
        ("model", REQUIRED),
        ("filename", REQUIRED),
        ("metadata", None),
        ("force_contiguous", True),
        "*",
        ("max_shard_size", None),
        ("prefix", ""),
        ("rename", None),
        ("durable", False),
        ("progress", None),
        ("filesystem", None),
    ],
    "load_sharded": [
        ("path", REQUIRED),
        ("device", "cpu"),
        "*",
        ("backend", "mmap"),
        ("prefault", None),
        ("dtype", None),
        ("names", None),
        ("variant", None),
        ("extra", "error"),
        ("progress", None),
        ("filesystem", None),
    ],
    "save_sharded": [
        ("tensors", REQUIRED),
        ("directory", REQUIRED),
        ("metadata", None),
        "*",
        ("max_shard_size", "5GB"),
        ("stem", "model"),
        ("force_contiguous", False),
        ("shared", "error"),
        ("durable", False),
        ("progress", None),
        ("filesystem", None),
    ],
    "inspect": [("path", REQUIRED), "*", ("filesystem", None)],
    "safe_open": [
        ("filename", REQUIRED),
        ("framework", "pt"),
        ("device", "cpu"),
        "*",
        ("backend", "mmap"),
        ("variant", None),
        ("extra", "error"),
        ("filesystem", None),
    ],
    "patch_safetensors": ["*", ("dcp", False)],
    "unpatch_safetensors": [],
    "IncrementalWriter": [("filename", REQUIRED), ("tensors", REQUIRED), ("metadata", None), "*", ("durable", False)],
    "edit_metadata": [
        ("filename", REQUIRED),
        ("changes", REQUIRED),
        "*",
        ("in_place", False),
        ("reserve", 0),
        ("durable", False),
        ("progress", None),
    ],
    "transfer_options": [],
    "set_transfer_options": ["*", ("pinned_pool_bytes", None), ("threads", None), ("direct", None)],
    "reserve_transfer_memory": [("nbytes", REQUIRED)],
    "release_transfer_memory": [],
    "transfer_memory": [],
    "extension_link_args": [],
}
CLASSES = ["safe_open", "IncrementalWriter"]
FUNCTIONS = [name for name in SIGNATURES if name not in CLASSES]


def described(function: object) -> list[object]:
    result: list[object] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in result:
            result.append("*")
        else:
            assert parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY), name
        result.append((name, parameter.default))
    return result


@pytest.mark.parametrize("name", [*SIGNATURES, "SafetensorError"])
def test_name_is_public(name: str) -> None:
    assert name in safetensors_torch.__all__
    assert getattr(safetensors_torch, name).__name__ == name
    assert inspect.getdoc(getattr(safetensors_torch, name))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert described(getattr(safetensors_torch, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_type_hints_resolve_and_cover_every_parameter(name: str) -> None:
    function = getattr(safetensors_torch, name)
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


METHODS = (
    "__enter__ __exit__ __contains__ __getitem__ __len__ __iter__ keys values items offset_keys metadata get_tensor"
    " get_tensors get_slice get_shape get_dtype close"
)


@pytest.mark.parametrize("method", ["__init__", *METHODS.split()])
def test_type_hints_of_safe_open_resolve(method: str) -> None:
    function = getattr(safetensors_torch.safe_open, method)
    hints = typing.get_type_hints(function)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    assert set(hints) >= {parameter.name for parameter in parameters if parameter.kind not in variadic} | {"return"}


@pytest.mark.parametrize("method", "__init__ __enter__ __exit__ write missing commit discard".split())
def test_type_hints_of_safe_writer_resolve(method: str) -> None:
    function = getattr(safetensors_torch.IncrementalWriter, method)
    parameters = set(inspect.signature(function).parameters) - {"self"}
    assert set(typing.get_type_hints(function)) == parameters | {"return"}


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_opened_is_a_class(name: str) -> None:
    assert inspect.isclass(getattr(safetensors_torch, name))


def test_error_class_catches_what_the_package_raises_and_nothing_wider() -> None:
    error = safetensors_torch.SafetensorError
    assert issubclass(error, Exception)
    assert not issubclass(error, (OSError, ValueError, TypeError, RuntimeError))
    with pytest.raises(error):
        safetensors_torch.load(b"")


def test_programs_find_the_cmake_package_and_the_headers() -> None:
    for name in ("cmake_prefix_path", "include_path"):
        assert name in safetensors_torch.__all__
        assert typing.get_type_hints(safetensors_torch)[name] is str
    prefix, headers = Path(safetensors_torch.cmake_prefix_path), Path(safetensors_torch.include_path)
    package = prefix / "lib" / "cmake" / "SafetensorsTorch"
    repository = Path(__file__).resolve().parents[2]
    assert {path.name for path in package.iterdir()} == {path.name for path in (repository / "cmake").iterdir()}
    shipped = {path.relative_to(headers) for path in headers.rglob("*") if path.is_file()}
    include = repository / "include"
    assert shipped == {path.relative_to(include) for path in include.rglob("*") if path.is_file()}


def test_types_are_marked_as_shipped() -> None:
    assert (Path(safetensors_torch.__file__).parent / "py.typed").is_file()
