"""Checks of the arguments of Python callers, and their conversion for the operators.

Owns the types of paths, devices, keywords, flags, dtypes and text, and the errors for wrong ones. Checks that need the
file or the tensors are left to the native library.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any

import torch

from ._dtype_names import dtype_name
from ._errors import near_names, short_repr, truncate
from ._exceptions import os_error
from ._locations import RemotePath

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Device = str | int | torch.device | None
Dtype = torch.dtype | str | None
Metadata = dict[str, str] | None

Filesystem = Any

_OTHER_FUNCTIONS = (
    'load() and safe_open() read data in memory and files opened with "rb"; save() returns bytes, to be written to one'
)

_SCHEME = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]+):/+.")
_LOCAL_ONLY = "this function takes local paths; load_file, save_file and others take URLs, so load it, and save it anew"
_REPOSITORY = re.compile(rb"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.safetensors)(?<!\.json)")


def encode_path(filename: Path) -> bytes:
    """Returns ``filename`` as the bytes that the operating system takes.

    Raises:
        TypeError: ``filename`` is not a path.
        ValueError: it contains a null byte.
        FileNotFoundError: it is a URL, or a path in a filesystem.
    """
    if isinstance(filename, RemotePath):
        raise _not_found(filename.title.encode(), _LOCAL_ONLY)
    if not isinstance(filename, (str, bytes, os.PathLike)):
        raise TypeError(
            f"a file name must be a str, bytes or os.PathLike, not {type(filename).__name__}: {_OTHER_FUNCTIONS}"
        )
    path = os.fsencode(filename)
    if b"\0" in path:
        raise ValueError(f"embedded null byte in the file name {short_repr(filename)}: {_OTHER_FUNCTIONS}")
    scheme = _SCHEME.match(path)
    # A URL is a path too: save_sharded would create a directory `s3:`.
    if scheme and not os.path.lexists(scheme[1] + b":"):
        raise _not_found(path, _remedy_for_url(filename, scheme[1].lower()))
    return path


def _remedy_for_url(filename: Path, scheme: bytes) -> str:
    if scheme == b"file":
        return "pass the path without the scheme"
    if isinstance(filename, (bytes, os.PathLike)):
        return "pass a URL as a str: a path loses one of its slashes"
    return _LOCAL_ONLY


def encode_input_path(filename: Path) -> bytes:
    """Returns ``filename`` as encode_path does, for a file that must exist.

    Raises:
        FileNotFoundError: it is also not the name of a local file, but may be that of a repository.
    """
    path = encode_path(filename)
    if _REPOSITORY.fullmatch(path) and not os.path.lexists(os.path.dirname(path)):
        call = f'load_sharded("hf://{os.fsdecode(path)}")'
        raise _not_found(path, f"if it is a repository of the Hugging Face Hub, {call} reads it")
    return path


def title_of(filename: Any) -> str:
    """Returns a path, local or not, for an error text."""
    return filename.title if isinstance(filename, RemotePath) else path_text(encode_path(filename))


def path_text(path: bytes) -> str:
    """Returns a path for an error text, as the native library writes it."""
    return truncate(path.decode(errors="replace")) or '""'


def _not_found(path: bytes, remedy: str) -> OSError:
    return os_error(errno.ENOENT, f"No such file or directory: {path_text(path)}; {remedy}")


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
    """Returns ``dtype``, or the dtype of that name, if floating-point tensors can be converted to it.

    Raises:
        TypeError: it is not a dtype.
        ValueError: torch has no dtype of that name, or it is one of integers, bools or complex numbers.
    """
    if dtype is None:
        return None
    if isinstance(dtype, str):
        dtype = parse_dtype(dtype)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, not {type(dtype).__name__}; pass torch.float16")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, not {dtype}: tensors of other dtypes are not converted")
    return dtype


def parse_dtype(name: str) -> torch.dtype:
    """Returns the dtype called ``name``: torch's, with or without "torch.", the format's code, or "bf16" and so on.

    Raises:
        ValueError: there is no such dtype.
    """
    bare = dtype_name(name)
    dtype = getattr(torch, bare, None)
    if isinstance(dtype, torch.dtype):
        return dtype
    if bare == "auto":
        raise ValueError("dtype 'auto' is unknown; leave it out: tensors have the dtypes in the file")
    known = [known for known, value in vars(torch).items() if isinstance(value, torch.dtype)]
    near = near_names(bare, known)
    raise ValueError(f"dtype {short_repr(name)} is unknown; " + (f"did you mean {near}?" if near else "pass 'float16'"))


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
    _check_key(key, f"the metadata key {short_repr(key)}")
    if not isinstance(value, str):
        raise TypeError(
            f"the metadata value of {short_repr(key)} must be a str, not {type(value).__name__}; convert it with str()"
            " or json.dumps()"
        )
    check_text(value, f"the metadata value of {short_repr(key)}")


def check_name(name: Any) -> None:
    """Checks that the key of a tensor is text."""
    _check_key(name, f"the key {short_repr(name)}")


def _check_key(key: Any, what: str) -> None:
    if not isinstance(key, str):
        raise TypeError(f"{what} must be a str, not {type(key).__name__}; convert it with str()")
    check_text(key, what)


def has_utf8(text: str) -> bool:
    """Returns whether a tensor can have this name: a lone surrogate has no UTF-8, and no operator accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(text: Any, what: str) -> None:
    """Checks that ``text`` is a str that has UTF-8.

    Raises:
        TypeError: it is not a str; the error calls it ``what``.
        UnicodeEncodeError: it has a lone surrogate.
    """
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")
    text.encode()
