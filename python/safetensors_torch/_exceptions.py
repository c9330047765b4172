"""The exceptions of the package, without torch: the shell command raises them before torch is imported."""

from __future__ import annotations

import threading


class _Base(Exception):
    """Lets patch_safetensors change the bases of SafetensorError: Python refuses that if Exception is the only base."""


class SafetensorError(_Base):
    """A file or buffer that is not valid safetensors, a tensor that the format cannot hold, or a wrong request."""

    __module__ = __package__  # the public one, for tracebacks

    _code: int = 0
    """The number of the error in the C header; 0 if it was raised in Python."""


def os_error(number: int, message: str) -> OSError:
    """Returns an OSError of the subclass for the error ``number``; its str() is ``message`` alone."""
    error = type(OSError(number, ""))(message)
    error.errno = number
    # Pickle keeps an OSError's arguments and this dict; the number is not among the arguments.
    vars(error)["errno"] = number
    return error


_interrupts = threading.local()


def defer_interrupt(interrupt: BaseException) -> None:
    """Keeps an exception such as KeyboardInterrupt, which cannot pass through the native library, for its caller."""
    _interrupts.last = interrupt


def raise_interrupt() -> None:
    """Raises the exception that a call of the native library on this thread has deferred, if there is one."""
    interrupt = getattr(_interrupts, "last", None)
    if interrupt is not None:
        _interrupts.last = None
        try:
            raise interrupt
        finally:
            # Its traceback has this frame: a cycle that would keep files open until it is collected.
            del interrupt
