"""Prints the licences of the crates in the C library, which packages of compiled code must contain.

Run: python packaging/licenses.py [--features bridge]
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The first one that a crate has. LICENSE is for the crates that do not offer MIT.
FILES = ("LICENSE-MIT", "LICENSE")


def crates(features: str) -> dict[str, Path]:
    """Returns the directory of each crate, by name and version."""
    # Unlike `cargo metadata`, a check needs no crate that the library does not contain.
    command = ("cargo", "check", "--locked", "--quiet", "--message-format=json", "--features", features)
    target = ("--target-dir", str(ROOT / "target" / "licenses"))
    lines = subprocess.run((*command, *target), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in lines.splitlines()]
    manifests = {Path(message["manifest_path"]) for message in messages if message["reason"] == "compiler-artifact"}
    return {manifest.parent.name: manifest.parent for manifest in manifests if manifest.parent != ROOT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--features", default="", help="features of the library")
    for name, directory in sorted(crates(parser.parse_args().features).items()):
        found = [directory / file for file in FILES if (directory / file).exists()]
        if not found:
            raise SystemExit(
                f"{directory}: the crate has none of the files {', '.join(FILES)}; add the name of its own"
            )
        print(f"{name}\n\n{found[0].read_text(encoding='utf-8').strip()}\n\n")


if __name__ == "__main__":
    main()
