"""The recipes in packaging/ that cannot read Cargo.toml agree with it. tests/packaging builds the packages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def version() -> str:
    found = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_conda_recipe_has_the_version_of_the_crate() -> None:
    recipe = (ROOT / "packaging/conda/recipe.yaml").read_text()
    assert re.findall(r'version: "(.*)"', recipe) == [version()]
    assert re.findall(r"\.so\.(\d+)", recipe) == [version().partition(".")[0]]


def test_the_debian_packages_have_the_major_version_of_the_crate() -> None:
    # The name of a Debian package contains the version in the SONAME.
    names = {version for text in debian_files() for version in re.findall(r"libsafetensors-torch-c(\d+)", text)}
    assert names == {version().partition(".")[0]}


def debian_files() -> list[str]:
    return [(ROOT / "packaging/debian" / name).read_text() for name in ("control", "build.py")]
