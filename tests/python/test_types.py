"""The package's annotations: mypy accepts typed/every_name.py, which uses every public name."""

from __future__ import annotations

import ast
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

import safetensors_torch

PACKAGE = Path(safetensors_torch.__file__).parent
EVERY_NAME = Path(__file__).parent / "typed" / "every_name.py"


def test_every_public_name_is_used() -> None:
    tree = ast.parse(EVERY_NAME.read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "safetensors_torch"
    }
    assert set(safetensors_torch.__all__) - used == set(), f"{EVERY_NAME.name} does not use these"


def test_mypy_accepts_them(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    environment = dict(os.environ)
    if str(PACKAGE.parent) not in site.getsitepackages():
        environment["MYPYPATH"] = str(PACKAGE.parent)  # mypy ignores PYTHONPATH
    # mypy takes the types of torch without checking torch itself. Its cache saves ten seconds in later runs.
    cache = request.config.cache.mkdir("mypy")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={cache}")
    result = subprocess.run([*mypy, str(EVERY_NAME)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
