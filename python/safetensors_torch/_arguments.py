"""What Python callers pass, as the operators take it: paths, devices by number, backends, flags, dtypes.

Owns the types of these arguments, and the errors for what is none of them. What only the native library can judge is
left to it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ._errors import short_repr

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Device = str | int | torch.device | None


def encode_path(filename: Path) -> bytes:
    """``filename`` as the bytes that the operating system takes.

    Raises:
        TypeError: ``filename`` is no path.
        ValueError: it contains a null byte.
    """
    if not isinstance(filename, (str, bytes, os.PathLike)):
        raise TypeError(
            f"a file name must be a str, bytes or os.PathLike, not {type(filename).__name__}: {_OTHER_FUNCTIONS}"
        )
    path = os.fsencode(filename)
    if b"\0" in path:
        raise ValueError(f"embedded null byte in the file name {short_repr(filename)}: {_OTHER_FUNCTIONS}")
    return path


_OTHER_FUNCTIONS = (
    'load() and safe_open() read data in memory and files opened with "rb"; save() returns bytes, to be written to one'
)


def to_device(device: Device) -> torch.device:
    """``device`` as a torch.device: a number is an index of the current accelerator, None the CPU.

    torch's default device plays no part: the functions take "cpu" where the caller names none.

    Raises:
        TypeError: ``device`` is of another type.
        ValueError: a negative number.
        RuntimeError: a name that torch does not know, or a number where torch has no accelerator.
    """
    if isinstance(device, (str, torch.device)):
        return torch.device(device)
    if device is None:
        return torch.device("cpu")
    if not isinstance(device, int) or isinstance(device, bool):
        raise TypeError(f"device must be a str, an int, a torch.device or None, not {type(device).__name__}")
    if device < 0:
        raise ValueError(f"device {device} is invalid: the index of an accelerator is not negative")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise RuntimeError(f"device {device} is invalid: this torch has no accelerator that a number could mean")
    return torch.device(accelerator.type, device)


def to_keyword(value: Any) -> str:
    """Returns ``value`` as text for an operator, which refuses unknown keywords with an error that lists its own.

    What is not an ASCII str is escaped: a lone surrogate has no UTF-8, and no operator would take it.
    """
    return value if isinstance(value, str) and value.isascii() else ascii(value)


def check_variant(variant: Any) -> str | None:
    """``variant`` if it is text or None.

    Raises:
        TypeError: it is not.
        UnicodeEncodeError: it has a lone surrogate.
    """
    if variant is not None:
        if not isinstance(variant, str):
            raise TypeError(f"variant must be a str or None, not {type(variant).__name__}")
        variant.encode()
    return variant


def check_bool(value: Any, name: str) -> bool:
    """``value`` if it is a bool.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return value


def check_dtype(dtype: Any) -> torch.dtype | None:
    """``dtype`` if it is one that floating-point tensors can be converted to.

    Raises:
        TypeError: it is no dtype.
        ValueError: one of integers, bools or complex numbers.
    """
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, not {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, not {dtype}: tensors of other dtypes are not converted")
    return dtype


def check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata must be a dict of str to str or None, not {type(metadata).__name__}")
    for key, value in metadata.items():
        check_text(key, f"the metadata key {short_repr(key)}")
        check_text(value, f"the metadata value of {short_repr(key)}")


def check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")
    text.encode()
