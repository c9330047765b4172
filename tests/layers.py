"""Checks the dependencies between the modules of src/: they point down the layers, and form no cycle.

Run: python tests/layers.py [DIRECTORY]

A `mod.rs` or `lib.rs` that only declares and re-exports is not a module here: a path through it leads to the file that
defines the name. Test modules are skipped.
"""

from __future__ import annotations

import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

LAYERS = ("error",), ("sys",), ("format",), ("read", "write"), ("checkpoint",), ("capi", "bridge")
# cxx requires a cycle: the bridge names the types of its submodules, and they use the structs that it generates.
EXEMPT = ("bridge",)

SKIPPED = re.compile(r"""//[^\n]*|/\*.*?\*/|b?r(\#*)".*?"\1|b?"(?:\\.|[^"\\])*"|b?'(?:\\[^']+|[^'\\])'""", re.DOTALL)
PATH = re.compile(r"\b(?:crate|super|self)(?:::\w+)+")
USE = re.compile(r"\buse\s+([^;]+);")

Module = tuple[str, ...]


def block_end(text: str, start: int) -> int:
    """Returns where the item at `start` ends: behind its block, or behind its semicolon."""
    depth = 0
    for match in re.compile(r"[{};]").finditer(text, start):
        depth += {"{": 1, "}": -1, ";": 0}[match[0]]
        if depth == 0:
            return match.end()
    return len(text)


def read_code(path: Path) -> str:
    """Returns the text of a file without comments, strings and test items."""
    text = SKIPPED.sub(" ", path.read_text(encoding="utf-8"))
    while match := re.search(r"#\[cfg\(test\)\]", text):
        text = text[: match.start()] + text[block_end(text, match.end()) :]
    return text


def expand(tree: str) -> list[tuple[str, str]]:
    """Returns the path and the local name of each import in a `use` tree."""
    head, brace, rest = tree.strip().partition("{")
    if not brace:
        path, _, alias = head.partition(" as ")
        return [(path.strip().removesuffix("::self"), alias.strip() or path.split("::")[-1].strip())] if path else []
    found, depth, part = [], 0, ""
    for character in rest[: rest.rindex("}")] + ",":
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            found += [(head + path, name) for path, name in expand(part)] if part.strip() else []
            part = ""
        else:
            part += character
    return [(path.removesuffix("::self"), path.split("::")[-2] if name == "self" else name) for path, name in found]


class Tree:
    """The modules under a directory, and what each file imports."""

    def __init__(self, root: Path) -> None:
        self.code: dict[Module, str] = {}
        for path in root.rglob("*.rs"):
            parts = path.relative_to(root).with_suffix("").parts
            self.code[() if parts == ("lib",) else parts[:-1] if parts[-1] == "mod" else parts] = read_code(path)
        self.imports = {module: self.imports_of(module) for module in self.code}
        self.thin = {module for module, code in self.code.items() if self.is_thin(code)}

    @staticmethod
    def is_thin(code: str) -> bool:
        without_uses = re.sub(r"\b(pub(\([^)]*\))?\s+)?(use\s+[^;]+|mod\s+\w+);", "", code)
        return not re.sub(r"#!?\[[^\]]*\]", "", without_uses).strip()

    def imports_of(self, module: Module) -> dict[str, Module]:
        """Returns the absolute path behind each name that the module imports."""
        trees = [pair for tree in USE.findall(self.code[module]) for pair in expand(tree)]
        return {name: path for text, name in trees if (path := self.absolute(module, text)) is not None}

    def absolute(self, module: Module, text: str) -> Module | None:
        first, *rest = text.strip().split("::")
        if first == "crate":
            return tuple(rest)
        if first == "self" or (*module, first) in self.code:
            return (*module, *(rest if first == "self" else [first, *rest]))
        while first == "super":
            module = module[:-1]
            if rest[:1] != ["super"]:
                return (*module, *rest)
            first, *rest = rest
        return None

    def resolve(self, path: Module, depth: int = 0) -> Module | None:
        """Returns the file that defines `path`; None for a module that only re-exports."""
        module: Module = ()
        rest = list(path)
        while rest and (*module, rest[0]) in self.code:
            module = (*module, rest.pop(0))
        if module not in self.thin:
            return module
        target = self.imports[module].get(rest[0]) if rest else None
        return self.resolve((*target, *rest[1:]), depth + 1) if target is not None and depth < 9 else None

    def dependencies(self, module: Module) -> set[Module]:
        """Returns the files that a module refers to, except itself."""
        code = self.code[module]
        paths = set(self.imports[module].values())
        paths |= {path for text in PATH.findall(code) if (path := self.absolute(module, text)) is not None}
        names = {child[-1]: child for child in self.code if child[:-1] == module} | self.imports[module]
        for name, first, rest in re.findall(r"(?<![\w:])(\w+)::(\w+)((?:::\w+)*)", code):
            if name in names:
                paths.add((*names[name], first, *filter(None, rest.split("::"))))
        return {target for path in paths if (target := self.resolve(path)) not in (None, module)}


def faults(tree: Tree) -> list[str]:
    """Returns a line for each upward dependency and for each cycle among the entries of one directory."""
    found = []
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    graph = {module: tree.dependencies(module) for module in sorted(tree.code) if module not in tree.thin and module}
    for module, targets in graph.items():
        for target in sorted(targets):
            if not target or height.get(module[0], -1) < height.get(target[0], len(LAYERS)):
                found.append(f"{'::'.join(module)} depends on {'::'.join(target) or 'lib.rs'}, which is above it")
    for directory in sorted({module[:length] for module in graph for length in range(len(module))}):
        entries: dict[str, set[str]] = {}
        size = len(directory)
        for module, targets in graph.items():
            if module[:size] != directory or directory[:1] == EXEMPT:
                continue
            inside = {"::".join(target[: size + 1]) for target in targets if target[:size] == directory}
            entry = "::".join(module[: size + 1])
            entries.setdefault(entry, set()).update(inside - {entry})
        try:
            TopologicalSorter(entries).prepare()
        except CycleError as error:
            found.append("cycle: " + " <- ".join(error.args[1]))
    return found


def main() -> None:
    tree = Tree(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "src"))
    if found := faults(tree):
        raise SystemExit("\n".join(found))
    print(f"the {len(tree.code) - len(tree.thin)} modules of src/ depend only on modules below them")


if __name__ == "__main__":
    main()
