"""The examples in the docstrings of every public name: there is one for each function, and it works."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest
import torch

import safetensors_torch

NAMES = [name for name in safetensors_torch.__all__ if callable(getattr(safetensors_torch, name))]
# An exception, and the results of functions that have an example, need none.
WITHOUT = {"SafetensorError", "TransferOptions", "CheckpointInfo", "TensorInfo"}
# Results of methods of safe_open, which has the example.
WITHOUT |= {"PrefetchLoader", "PySafeSlice", "TensorMeta"}


@pytest.mark.parametrize("name", NAMES)
def test_examples_work(name: str, tmp_path: Path) -> None:
    public = {other: getattr(safetensors_torch, other) for other in safetensors_torch.__all__}
    given = {"torch": torch, "path": tmp_path / "model.safetensors", "directory": tmp_path / "directory"}
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags)
    text = inspect.getdoc(public[name]) or ""
    test = doctest.DocTestParser().get_doctest(text, {**public, **given}, name, None, None)
    assert bool(test.examples) == (name not in WITHOUT)
    said: list[str] = []
    runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
