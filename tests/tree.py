"""Checks the tree in docs/architecture.md: each source file has one line there, and each line names an existing file.

Run: python tests/tree.py

A directory's line describes its mod.rs too. `name.{h,cpp}` stands for both files.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/architecture.md"
SOURCES = ("src", "cpp", "include", "python")


def listed_files() -> set[str]:
    """Returns the files that the page lists."""
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    tree = page.partition("<!-- tree: begin -->\n\n```\n")[2].partition("```\n")[0]
    files: list[str] = []
    parents: list[str] = []
    for line in tree.splitlines():
        indent, name, description = re.fullmatch(r"((?:  )*)(\S+)(?: +(.+))?", line).groups()
        del parents[len(indent) // 2 :]
        path = "".join([*parents, name])
        if name.endswith("/"):
            parents.append(name)
        elif not description:
            raise SystemExit(f"{PAGE}: {path} has no description")
        elif group := re.fullmatch(r"(.*)\{(.*)\}", path):
            files += [group[1] + ending for ending in group[2].split(",")]
        else:
            files.append(path)
    if twice := sorted({file for file in files if files.count(file) > 1}):
        raise SystemExit(f"{PAGE} lists {', '.join(twice)} twice")
    return set(files)


def main() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *SOURCES]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    existing = {file for file in found if (ROOT / file).exists() and not file.endswith("/mod.rs")}
    listed = listed_files()
    faults = [f"{PAGE}: {file} is missing; add a line" for file in sorted(existing - listed)]
    faults += [f"{PAGE}: {file} does not exist; remove its line" for file in sorted(listed - existing)]
    if faults:
        raise SystemExit("\n".join(faults))
    print(f"the tree in {PAGE} lists all {len(existing)} source files")


if __name__ == "__main__":
    main()
