"""What the library is made of is what SECURITY.md says, and comes from one registry, with checksums."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def packages() -> dict[str, dict[str, str]]:
    text = (ROOT / "Cargo.lock").read_text()
    found = {}
    for block in text.split("[[package]]")[1:]:
        fields = dict(re.findall(r'^(\w+) = "([^"]*)"$', block, re.MULTILINE))
        fields["needs"] = " ".join(re.findall(r'^ "([\w-]+)', block, re.MULTILINE))
        found[fields["name"]] = fields
    return found


def test_every_crate_is_pinned_with_its_checksum() -> None:
    found = packages()
    assert len(found) > 10
    assert len({fields["source"] for fields in found.values() if "source" in fields}) == 1
    for name, fields in found.items():
        if name != "safetensors-torch":
            assert fields["source"].startswith("registry+"), name
            assert re.fullmatch("[0-9a-f]{64}", fields["checksum"]), name


def test_the_core_is_linked_with_what_security_md_lists() -> None:
    manifest = (ROOT / "Cargo.toml").read_text()
    section = manifest.partition("[dependencies]\n")[2].partition("\n\n")[0]
    needed = [line.split(" ")[0] for line in section.splitlines() if "optional" not in line]
    found = packages()
    linked: set[str] = set()
    while needed:
        name = needed.pop()
        if name not in linked:
            linked.add(name)
            needed += found[name]["needs"].split()
    # Crates that make code while the core is built, and are not in it.
    linked -= {"serde_derive", "proc-macro2", "quote", "syn", "unicode-ident"}
    table = (ROOT / "SECURITY.md").read_text().partition("| crate | why |\n|---|---|\n")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines() for name in re.findall(r"[\w-]+", row.split("|")[1])}
    assert listed - {"with"} == linked
