"""Maps the names of a module's tensors to those in a file: ``prefix`` and ``rename`` of load_model and save_model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ._arguments import check_text
from ._errors import short_repr, truncate

Rename = Callable[[str], str] | None
T = TypeVar("T")


class NameMapping:
    """The mapping of a tensor ``name`` of the module to ``prefix + rename(name)`` in the file.

    Args:
        class_name: the module's class, for error texts.
        prefix: the beginning of the names in the file.
        rename: a function from the module's names to those in the file; None means the same names.

    Raises:
        TypeError: ``prefix`` is not a str, or ``rename`` is not callable.
    """

    def __init__(self, class_name: str, prefix: str, rename: Rename) -> None:
        check_text(prefix, "prefix")
        if rename is not None and not callable(rename):
            raise TypeError(f"rename must be a function of a name, or None, not {type(rename).__name__}")
        self._class_name, self.prefix, self._rename = class_name, prefix, rename

    def in_file(self, name: str) -> str:
        """Returns the name in the file."""
        if self._rename is not None:
            renamed = self._rename(name)
            check_text(renamed, f"the name that `rename` returns for {short_repr(name)}")
            name = renamed
        return self.prefix + name

    def state_in_file(self, state: dict[str, T]) -> dict[str, T]:
        """Returns ``state`` under the names in the file.

        Raises:
            ValueError: two names map to one.
        """
        result: dict[str, T] = {}
        for name, value in state.items():
            renamed = self.in_file(name)
            if renamed in result:
                raise ValueError(
                    f"two tensors of {self._class_name} are called {truncate(renamed)} by `rename`,"
                    f" `{truncate(name)}` and one before it: give each its own name"
                )
            result[renamed] = value
        return result

    def select(self, names: Iterable[str]) -> list[str] | None:
        """Returns those of a file's ``names`` that may be the module's; None means all."""
        return [name for name in names if name.startswith(self.prefix)] if self.prefix else None

    def to_module(self, state: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
        """Maps each of a file's ``names`` to the name in the module, whose state is ``state``.

        A name that the state lacks maps to itself without the prefix, because a hook may know it, unless the state has
        another tensor of that name.
        """
        known = {self.in_file(name): name for name in state}
        result = {name: known[name] for name in names if name in known}
        for name in names:
            bare = name[len(self.prefix) :]
            if name not in known and bare not in state:
                result[name] = bare
        return result
