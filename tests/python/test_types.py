"""What type checkers see of the package, through its own annotations: typed/every_name.py, which mypy is to accept."""

from __future__ import annotations

import ast
import os
import site
import subprocess
import sys
from pathlib import Path

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


def test_mypy_accepts_them(tmp_path: Path) -> None:
    environment = dict(os.environ)
    if str(PACKAGE.parent) not in site.getsitepackages():
        environment["MYPYPATH"] = str(PACKAGE.parent)  # it looks at no PYTHONPATH
    # Of torch the names and types alone are of interest, not whether they are right.
    mypy = (sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}")
    result = subprocess.run([*mypy, str(EVERY_NAME)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
