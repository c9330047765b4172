"""The translation of what the operators throw into the exceptions of the package, and how values look in their texts.

Owns the one place where a RuntimeError out of torch becomes the exception that the
caller is promised. It decides nothing about when something is an error: the native library does, and says so
through the operator ``_last_error``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._exceptions import SafetensorError
from ._tracing import dynamo_disable

_BUILTIN: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "IndexError": IndexError,
    "MemoryError": MemoryError,
}


# The most characters of a name, or of another value, that a message shows.
_MOST_SHOWN = 200


def truncate(text: str) -> str:
    """``text`` for a message: of a long one the beginning, and how long it is."""
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(text)} characters)"


def short_repr(value: Any) -> str:
    """``repr(value)`` for a message, shortened: callers pass the contents of a file for its name."""
    if isinstance(value, (str, bytes, bytearray)) and len(value) > _MOST_SHOWN:
        unit = "characters" if isinstance(value, str) else "bytes"
        return f"{value[:_MOST_SHOWN]!r}... ({len(value)} {unit})"
    text = repr(value)
    # What is short enough may need escapes.
    return text if isinstance(value, (str, bytes, bytearray)) else truncate(text)


def translate(error: RuntimeError) -> Exception:
    """The exception that ``error``, thrown by an operator or a method of File, stands for.

    Args:
        error: the RuntimeError in which torch hands the native text to Python. The text is UTF-8: file names that
            are not are in it with U+FFFD in place of the odd bytes.

    Returns:
        An exception of the promised class, or ``error`` itself where it did not come from this library.
    """
    try:
        kind, code, os_error, message = torch.ops.safetensors_torch._last_error()
    except UnicodeDecodeError:
        # The last error is an older one, of an operator that somebody called with names that are not UTF-8.
        return error
    # A backtrace may follow the message (TORCH_SHOW_CPP_STACKTRACES); another text is another error.
    if not message or not str(error).startswith(message):
        return error
    if kind == "SafetensorError":
        refused = SafetensorError(message)
        refused._code = code
        return refused
    if kind == "OSError":
        # OSError picks the subclass from the number; built from the text alone, str() shows just the text.
        translated = type(OSError(os_error, ""))(message)
        translated.errno = os_error
        # Where pickle finds it: of an OSError it takes the arguments, of which the number is none, and this dict.
        vars(translated)["errno"] = os_error
        return translated
    builtin = _BUILTIN.get(kind)
    return error if builtin is None else builtin(message)


@dynamo_disable
def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` for an operator or a method of File, with its errors translated."""
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        translated = translate(error)
        if translated is error:
            raise
        raise translated from None
