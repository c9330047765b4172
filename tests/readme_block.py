"""Prints code blocks of a Markdown file, or writes its programs to files.

Run: python tests/readme_block.py LANGUAGE [FILE [NAME]]
     python tests/readme_block.py --programs FILE DIRECTORY

FILE is README.md by default. The comment in the first line of a block is its name: `// load.cpp`, `/* list.c */`,
`# CMakeLists.txt`. Without NAME, all blocks of LANGUAGE are printed.

With --programs, every block with a name is written to DIRECTORY/NAME, and the `text` block behind it, the output of the
program, to DIRECTORY/NAME.expected. Blocks in C, C++, CMake and Python must have names. The names are printed in order.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Block(NamedTuple):
    language: str
    code: str

    @property
    def name(self) -> str | None:
        found = re.match(r"(?://|/\*|#) ([\w-]+\.\w+)(?: \*/)?\n", self.code)
        return found and found[1]


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


def write_programs(path: Path, directory: Path) -> list[str]:
    names: list[str] = []
    for block, following in zip(found := blocks_of(path), [*found[1:], Block("", "")], strict=True):
        if (name := block.name) is None:
            if block.language in ("c", "cpp", "cmake", "python"):
                raise SystemExit(f"{path}: a {block.language} block has no name:\n{block.code}")
            continue
        if name in names:
            raise SystemExit(f"{path}: two blocks are called {name}")
        names.append(name)
        (directory / name).write_text(block.code, encoding="utf-8")
        if following.language == "text":
            (directory / f"{name}.expected").write_text(following.code, encoding="utf-8")
    if not names:
        raise SystemExit(f"{path}: no block has a name")
    return names


def main(arguments: list[str]) -> None:
    if arguments[0] == "--programs":
        path, directory = arguments[1:]
        print("\n".join(write_programs(ROOT / path, Path(directory))))
        return
    language, path, name = [*arguments, *["README.md", ""][len(arguments) - 1 :]]
    found = [block for block in blocks_of(ROOT / path) if block.language == language and name in ("", block.name)]
    if not found:
        raise SystemExit(f"{path}: no {language} block" + (f" is called {name}" if name else ""))
    print("\n".join(block.code for block in found))


if __name__ == "__main__":
    main(sys.argv[1:])
