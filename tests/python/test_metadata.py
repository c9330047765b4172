"""The metadata that setup.py writes for the package index."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A Markdown link whose target is a path.
RELATIVE_LINK = re.compile(r"\]\((?!https?:)")


def metadata(directory: Path, repository: str = "") -> Message:
    """Returns the metadata of the package if Cargo.toml names that repository, or none."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / "python", directory / "python", ignore=shutil.ignore_patterns("native", "__pycache__"))
    cargo = re.sub("^repository = .*\n", "", (ROOT / "Cargo.toml").read_text(), flags=re.MULTILINE)
    line = f'repository = "{repository}"\n' if repository else ""
    (directory / "Cargo.toml").write_text(cargo.replace("\n[lib]", f"{line}\n[lib]", 1))
    command = (sys.executable, "setup.py", "-q", "egg_info", "--egg-base", directory)
    subprocess.run(command, cwd=directory, env={**os.environ, "SAFETENSORS_TORCH_AOT": "0"}, check=True)
    return email.message_from_string((directory / "safetensors_torch.egg-info" / "PKG-INFO").read_text())


def test_the_index_shows_the_readme_without_dead_links(tmp_path: Path) -> None:
    said = metadata(tmp_path)
    assert said.get_all("Project-URL") is None
    assert said["Description-Content-Type"] == "text/markdown"
    readme, text = (ROOT / "README.md").read_text(), said.get_payload()
    assert RELATIVE_LINK.search(readme) and not RELATIVE_LINK.search(text)
    assert "[safetensors](https://github.com/huggingface/safetensors)" in text
    assert "\n| change it | architecture · " in text


def test_links_lead_to_the_repository_if_there_is_one(tmp_path: Path) -> None:
    said = metadata(tmp_path, "https://example.org/safetensors-torch")
    assert said.get_all("Project-URL") == ["Source, https://example.org/safetensors-torch"]
    assert not RELATIVE_LINK.search(said.get_payload())
    assert "[architecture](https://example.org/safetensors-torch/blob/HEAD/docs/architecture.md)" in said.get_payload()
    assert "(https://example.org/safetensors-torch/raw/HEAD/docs/view-light.png)" in said.get_payload()


def test_the_index_finds_the_package(tmp_path: Path) -> None:
    said = metadata(tmp_path)
    authors = re.search(r'^authors = \["(.*)"\]$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    assert said["Author"] == authors[1]
    assert "safetensors" in said["Keywords"].split(",")
    for minor in range(10, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in said.get_all("Classifier")
