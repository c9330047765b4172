"""The dependencies are those in SECURITY.md, from one registry, with checksums."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = {"safetensors-torch", "safetensors-torch-fuzz"}
# None requires more of a distributor than to name the authors.
PERMISSIVE = {"MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "Unlicense", "Zlib", "Unicode-3.0", "NCSA"}

LOCK_FILES = pytest.mark.parametrize("lock_file", ["Cargo.lock", "fuzz/Cargo.lock"])


def tree(*options: str, manifest: str = "Cargo.toml") -> dict[str, str]:
    """Returns the crates that cargo uses, with their licences."""
    if shutil.which("cargo") is None:
        pytest.skip("needs cargo, which knows what a build takes")
    command = ["cargo", "tree", "--locked", "--manifest-path", ROOT / manifest, "--prefix", "none"]
    done = subprocess.run([*command, "--format", "{p}|{l}", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (line.removesuffix(" (*)").split("|") for line in done.stdout.splitlines() if "|" in line)
    return {package.split(" ")[0]: licence for package, licence in lines}


def listed(heading: str) -> set[str]:
    """Returns the crates in the first column of the table after `heading` in SECURITY.md."""
    text = (ROOT / "SECURITY.md").read_text()
    assert text.count(heading) == 1
    table = text.partition(heading)[2].partition("| crate | why |\n|---|---|\n")[2].partition("\n\n")[0]
    return {name for row in table.splitlines() for name in re.findall(r"[\w-]+", row.split("|")[1])} - {"with"}


@LOCK_FILES
def test_every_crate_is_pinned_with_its_checksum(lock_file: str) -> None:
    packages = [
        dict(re.findall(r'^(\w+) = "([^"]*)"$', block, re.MULTILINE))
        for block in (ROOT / lock_file).read_text().split("[[package]]")[1:]
    ]
    assert len(packages) > 10
    assert len({fields["source"] for fields in packages if "source" in fields}) == 1
    for fields in packages:
        if fields["name"] not in OWN:
            assert fields["source"].startswith("registry+"), fields
            assert re.fullmatch("[0-9a-f]{64}", fields["checksum"]), fields


@pytest.mark.parametrize("manifest", ["Cargo.toml", "fuzz/Cargo.toml"])
def test_every_licence_is_permissive(manifest: str) -> None:
    licences = tree("-e", "all", manifest=manifest)
    assert len(licences) > 20
    for name, licence in licences.items():
        # Old crates have a slash for "or".
        for demanded in licence.replace("/", " OR ").split(" AND "):
            offered = demanded.strip("()").split(" OR ")
            assert PERMISSIVE.intersection(offered), (name, licence)


def test_the_core_is_linked_with_what_security_md_lists() -> None:
    assert set(tree("-e", "normal")) - OWN == listed("## Made of")


def test_the_layer_is_built_with_what_security_md_lists() -> None:
    core = set(tree("-e", "normal,build"))
    assert set(tree("--features=torch", "-e", "normal,build")) - core == listed("With the libtorch layer")
