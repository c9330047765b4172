"""The exception class of the package, without torch: the shell command raises it too, before torch is imported."""

from __future__ import annotations


class _Base(Exception):
    """Lets patch_safetensors give SafetensorError another base: Python refuses that where Exception is the only one."""


class SafetensorError(_Base):
    """A file or buffer that is not valid safetensors, a tensor that the format cannot hold, or a wrong request."""

    _code: int = 0
    """The number of the error in the C header, or 0 for one that was raised in Python."""
