"""Checks of the arguments of Python callers, and their conversion for the operators.

Owns the types of paths, devices, keywords, flags, dtypes and text, and the errors for wrong ones. Checks that need the
file or the tensors are left to the native library.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ._errors import short_repr

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Device = str | int | torch.device | None
Metadata = dict[str, str] | None

_OTHER_FUNCTIONS = (
    'load() and safe_open() read data in memory and files opened with "rb"; save() returns bytes, to be written to one'
)


def encode_path(filename: Path) -> bytes:
    """Returns ``filename`` as the bytes that the operating system takes.

    Raises:
        TypeError: ``filename`` is not a path.
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


def to_device(device: Device) -> torch.device:
    """Returns ``device`` as a torch.device: a number is an index of the current accelerator, None the CPU.

    torch's default device is ignored.

    Raises:
        TypeError: ``device`` has another type.
        ValueError: the number is negative.
        RuntimeError: torch does not know the name, or there is no accelerator for a number.
    """
    if isinstance(device, (str, torch.device)):
        return torch.device(device)
    if device is None:
        return torch.device("cpu")
    if not _is_int(device):
        raise TypeError(f"device must be a str, an int, a torch.device or None, not {type(device).__name__}")
    if device < 0:
        raise ValueError(f"device {device} is invalid: the index of an accelerator is not negative")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise RuntimeError(f"device {device} is invalid: torch has no accelerator here; pass a name, such as 'cpu'")
    return torch.device(accelerator.type, device)


def to_keyword(value: Any) -> str:
    """Returns ``value`` as text for an operator, which refuses an unknown keyword with an error that lists its own.

    Everything except an ASCII str is escaped: a lone surrogate has no UTF-8, so no operator would take it.
    """
    return value if isinstance(value, str) and value.isascii() else ascii(value)


def check_variant(variant: Any) -> str | None:
    """Returns ``variant`` if it is text or None."""
    if variant is not None:
        check_text(variant, "variant")
    return variant


def check_bool(value: Any, name: str) -> bool:
    """Returns ``value`` if it is a bool, and raises TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return value


def check_int(value: Any, name: str) -> int:
    """Returns ``value`` if it is an int, limited to what an operator's int can hold.

    Raises:
        TypeError: it is not an int, or is a bool.
    """
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    return max(min(value, 1 << 62), -(1 << 62))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_dtype(dtype: Any) -> torch.dtype | None:
    """Returns ``dtype`` if floating-point tensors can be converted to it.

    Raises:
        TypeError: it is not a dtype.
        ValueError: it is a dtype of integers, bools or complex numbers.
    """
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, not {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, not {dtype}: tensors of other dtypes are not converted")
    return dtype


def check_metadata(metadata: Any) -> None:
    """Checks that ``metadata`` is None or a dict of text."""
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata must be a dict of str to str or None, not {type(metadata).__name__}")
    for key, value in metadata.items():
        check_metadata_entry(key, value)


def check_metadata_entry(key: Any, value: Any) -> None:
    """Checks that a key and a value of metadata are text."""
    check_text(key, f"the metadata key {short_repr(key)}")
    check_text(value, f"the metadata value of {short_repr(key)}")


def check_name(name: Any) -> None:
    """Checks that the key of a tensor is text."""
    check_text(name, f"the key {short_repr(name)}")


def check_text(text: Any, what: str) -> None:
    """Checks that ``text`` is a str that has UTF-8.

    Raises:
        TypeError: it is not a str; the error calls it ``what``.
        UnicodeEncodeError: it has a lone surrogate.
    """
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")
    text.encode()
