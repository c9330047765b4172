"""What only Python can check of tensors to be saved: that names are str, values tensors, and all of it text.

Owns these checks and the order of their faults. What is wrong with a tensor's memory or dtype the native library says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._python_dispatch import _disable_current_modes

from ._errors import call

_check_save = torch.ops.safetensors_torch._check_save.default

# Those of nearly all tensors, about which there is nothing to ask.
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


def check_tensors(tensors: Any, metadata: Any) -> None:
    """The checks that need the Python objects. Faults of names come last, after what the native library checks."""
    if not isinstance(tensors, dict):
        raise ValueError(f"Expected a dict of [str, torch.Tensor] but received {type(tensors)}")
    fake = False
    for name, tensor in tensors.items():
        if type(tensor) in _PLAIN_CLASSES:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Key `{name}` is invalid, expected torch.Tensor but received {type(tensor)}")
        if isinstance(tensor, UninitializedTensorMixin):
            raise ValueError(
                f"Key `{name}` is invalid: a lazy module has not given it a shape yet. Run the module once"
            )
        fake = fake or isinstance(tensor, FakeTensor)
    try:
        # One pass in C over every name, instead of two checks for each.
        "".join(tensors).encode()
        if metadata is not None:
            check_metadata(metadata)
    except (TypeError, UnicodeEncodeError):
        _check_memory(_with_printable_names(tensors))
        for name in tensors:
            check_text(name, f"the key {name!r}")
        raise
    if fake:
        _check_memory(tensors)


def _check_memory(tensors: dict[str, torch.Tensor]) -> None:
    """What the native library checks of the tensors, also where a mode would run a fake kernel instead."""
    with _disable_current_modes():
        call(_check_save, tensors)


def check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata must be a dict of str to str or None, not {type(metadata).__name__}")
    for key, value in metadata.items():
        check_text(key, f"the metadata key {key!r}")
        check_text(value, f"the metadata value of {key!r}")


def check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")
    text.encode()


def _with_printable_names(tensors: dict[Any, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under names that the operators take, none lost, so that the checks before can speak of them."""
    named: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = str(key).encode("utf-8", "backslashreplace").decode()
        while name in named:
            name += "'"
        named[name] = tensor
    return named
