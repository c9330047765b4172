"""Translates errors of the native library into Python exceptions, and formats values for error texts.

Owns the one place where a RuntimeError from torch becomes the documented exception. The native library decides what is
an error; its operator ``_last_error`` reports the kind.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._exceptions import SafetensorError, os_error, raise_interrupt
from ._tracing import dynamo_disable

_BUILTIN = {kind.__name__: kind for kind in (ValueError, TypeError, IndexError, MemoryError)}

_UNSUPPORTED_DTYPE = 17  # in the C header

# The most characters of a name or other value in an error text.
_MAX_LENGTH = 200


def truncate(text: str) -> str:
    """Returns ``text``, or the beginning and the length of a long one, with invisible characters escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_MAX_LENGTH])
    return shown if len(text) <= _MAX_LENGTH else f"{shown}... ({len(text)} characters)"


def short_repr(value: Any) -> str:
    """Returns ``repr(value)``, truncated: callers pass the contents of a file in place of its name."""
    if isinstance(value, (str, bytes, bytearray)):
        if len(value) <= _MAX_LENGTH:
            return repr(value)
        unit = "characters" if isinstance(value, str) else "bytes"
        return f"{value[:_MAX_LENGTH]!r}... ({len(value)} {unit})"
    return truncate(repr(value))


def near_names(name: str, names: Sequence[str]) -> str:
    """Returns the nearest of ``names``, quoted, for "did you mean"; an empty text if none is near."""
    # Long names, and more than a few thousand, take seconds to compare.
    candidates = [known for known in names[:5000] if len(known) <= _MAX_LENGTH]
    return " or ".join(map(repr, difflib.get_close_matches(name[:_MAX_LENGTH], candidates, n=3)))


def names_instead(name: str, names: Sequence[str]) -> str:
    """Returns the remedy for a ``name`` that is not among ``names``: the nearest ones, or some of them."""
    near = near_names(name, names)
    if near:
        return f"did you mean {near}?"
    if not names:
        return "it has no tensors"
    more = ", ..." if len(names) > 3 else ""
    return f"it has {len(names)} names: {', '.join(map(short_repr, names[:3]))}{more}"


def with_remedy(error: SafetensorError, remedy: str) -> SafetensorError:
    """Returns ``error`` with ``remedy`` after its text."""
    longer = SafetensorError(f"{error}; {remedy}")
    longer._code = error._code
    return longer


class NamedFile:
    """Puts a file before errors about a dtype that torch lacks or cannot convert: the operators name only tensors."""

    def __init__(self, title: str) -> None:
        self._title = title

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is SafetensorError and error._code == _UNSUPPORTED_DTYPE:
            error.args = (f"{self._title}: {error}",)


def translate(error: RuntimeError) -> Exception:
    """Returns the exception that ``error``, raised by an operator or a native class, stands for.

    Args:
        error: the RuntimeError in which torch wraps the native text. The text is UTF-8, with U+FFFD for the invalid
            bytes of file names.

    Returns:
        An exception of the documented class, or ``error`` itself if it is not this library's.
    """
    try:
        kind, code, number, message = torch.ops.safetensors_torch._last_error()
    except UnicodeDecodeError:
        # The last error is an older one, of an operator that was called with names that are not UTF-8.
        return error
    # A backtrace may follow the message (TORCH_SHOW_CPP_STACKTRACES). Another text is another error.
    if not message or not str(error).startswith(message):
        return error
    if kind == "SafetensorError":
        refused = SafetensorError(message)
        refused._code = code
        return refused
    if kind == "OSError":
        return os_error(number, message)
    builtin = _BUILTIN.get(kind)
    return error if builtin is None else builtin(message)


@dynamo_disable
def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls an operator or a method of a native class, and translates its errors."""
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        raise_interrupt()
        translated = translate(error)
        if translated is error:
            raise
        if isinstance(translated, InterruptedError):
            # Ctrl-C has ended a function of a source before its first statement.
            raise KeyboardInterrupt from None
        try:
            raise translated from None
        finally:
            # The traceback of `error` has this frame: a cycle that would keep files open until it is collected.
            del translated
