"""The tree of modules that the dots in names of tensors form, with totals, and with modules of one structure as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .._headers import TensorInfo
from .listing import as_json, parameters

# The most levels. Further dots stay in the name of a tensor.
_MOST_LEVELS = 100


class Node:
    """A module, a tensor, or several of either that have the same structure."""

    def __init__(self) -> None:
        self.children: dict[str, Node] = {}
        self.entry: TensorInfo | None = None
        """The tensor with the name of the node. If several nodes were merged into this one, the tensor of the first."""
        self.count = self.parameters = self.nbytes = 0
        """Totals of the tensors, with those of the children."""

    def add(self, count: int, parameters: int, nbytes: int) -> None:
        """Adds to the totals."""
        self.count += count
        self.parameters += parameters
        self.nbytes += nbytes

    def as_json(self, depth: int | None) -> dict[str, Any]:
        """Returns the node, and ``depth`` levels below it, as a dict."""
        result: dict[str, Any] = {"count": self.count, "parameters": self.parameters, "nbytes": self.nbytes}
        if self.entry is not None:
            result["tensor"] = as_json(self.entry)
        if self.children and depth != 0:
            below = None if depth is None else depth - 1
            result["children"] = {name: child.as_json(below) for name, child in self.children.items()}
        return result


class Line(NamedTuple):
    """A line of the tree."""

    level: int
    name: str
    node: Node


def build(entries: Iterable[TensorInfo]) -> Node:
    """Returns the tree of ``entries``. Children are in the order of their first tensor."""
    root = Node()
    for entry in entries:
        path = [root]
        for part in entry.name.split(".", _MOST_LEVELS):
            path.append(path[-1].children.setdefault(part, Node()))
        path[-1].entry = entry
        count = parameters(entry)
        for node in path:
            node.add(1, count, entry.nbytes)
    return root


def sort_by_size(node: Node) -> None:
    """Puts the largest children first, on each level."""
    node.children = dict(sorted(node.children.items(), key=lambda item: -item[1].nbytes))
    for child in node.children.values():
        sort_by_size(child)


def lines(node: Node, depth: int | None, level: int = 0) -> Iterator[Line]:
    """Returns a line for each node below ``node``, down to ``depth`` levels."""
    for name, child in node.children.items():
        yield Line(level, name, child)
        if level + 1 != depth:
            yield from lines(child, depth, level + 1)


def folded(root: Node) -> Node:
    """Returns a smaller tree for people.

    A module with one child is one node with it. Numbered siblings of one structure are one node, ``[0-31]``, whose
    children stand for those of all.
    """
    return _folded(root, {})[0]


def _folded(node: Node, structures: dict[Any, int]) -> tuple[Node, int]:
    """Returns ``node`` with its children folded, and a number that nodes of the same structure share."""
    children = {name: _folded(child, structures) for name, child in node.children.items()}
    kind = (node.entry.dtype, *node.entry.shape) if node.entry else None
    key = (kind, frozenset((name, structure) for name, (_, structure) in children.items()))
    structure = structures.setdefault(key, len(structures))
    groups: dict[int | str, list[str]] = {}
    for name, (_, of_child) in children.items():
        groups.setdefault(of_child if _is_number(name) else name, []).append(name)
    result = Node()
    result.entry = node.entry
    result.add(node.count, node.parameters, node.nbytes)
    for names in groups.values():
        title = _ranges(map(int, names)) if len(names) > 1 else names[0]
        if len(names) > 1 and title in children:  # a name that looks like several
            result.children.update((name, children[name][0]) for name in names)
            continue
        child = _merged([children[name][0] for name in names])
        if len(child.children) == 1 and child.entry is None:
            ((below, child),) = child.children.items()
            title = f"{title}.{below}"
        result.children[title] = child
    return result, structure


def _is_number(name: str) -> bool:
    return len(name) < 10 and name.isascii() and name.isdigit() and str(int(name)) == name


def _merged(nodes: list[Node]) -> Node:
    """Returns nodes of one structure as one, the first, with the totals of all."""
    first, *others = nodes
    for node in others:
        first.add(node.count, node.parameters, node.nbytes)
    if others:
        for name in first.children:
            _merged([node.children[name] for node in nodes])
    return first


def _ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as ``[0-3,5]``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return f"[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in ranges)}]"
