"""What only Python can check of tensors to be saved: that names are str, values tensors, and all of it text.

Owns these checks and the order of their faults. What is wrong with a tensor's memory or dtype the native library says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._python_dispatch import _disable_current_modes

from ._arguments import check_metadata, check_text
from ._errors import SafetensorError, call, short_repr, truncate

_check_save = torch.ops.safetensors_torch._check_save.default

# Those of nearly all tensors, about which there is nothing to ask.
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)

Tensors = dict[str, torch.Tensor]
Metadata = dict[str, str] | None

# Inside of its blocks nothing that is done with a tensor reaches the __torch_function__ of its class, or of a mode.
DisableTorchFunction = torch._C.DisableTorchFunction


def check_tensors(tensors: Any, metadata: Any, **rules: Any) -> tuple[Tensors, Metadata]:
    """The checks that need the Python objects. Faults of names come last, after what the native library checks.

    Args:
        tensors: the tensors by name.
        metadata: the text beside them.
        rules: force_contiguous and shared, for the native library.

    Returns:
        Copies of both dicts, which no other thread changes.
    """
    if not isinstance(tensors, dict):
        raise ValueError(f"Expected a dict of [str, torch.Tensor] but received {type(tensors)}")
    tensors = dict(tensors)
    if isinstance(metadata, dict):
        metadata = dict(metadata)
    with DisableTorchFunction():
        _check_tensors(tensors, metadata, rules)
    return tensors, metadata


def _check_tensors(tensors: dict[Any, Any], metadata: Any, rules: dict[str, Any]) -> None:
    fake, wrapper = False, None
    for name, tensor in tensors.items():
        if type(tensor) in _PLAIN_CLASSES:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Key `{_named(name)}` is invalid, expected torch.Tensor but received {type(tensor)}")
        if isinstance(tensor, UninitializedTensorMixin):
            raise ValueError(
                f"Key `{_named(name)}` is invalid: a lazy module has not given it a shape yet. Run the module once"
            )
        if isinstance(tensor, FakeTensor):
            fake = True
        elif wrapper is None and _is_wrapper(tensor):
            wrapper = name
    if wrapper is not None:
        others = {name: tensor for name, tensor in tensors.items() if not _is_wrapper(tensor)}
        _check_memory(_with_printable_names(others), rules)
        raise _without_memory(wrapper, tensors[wrapper])
    try:
        # One pass in C over every name, instead of two checks for each.
        "".join(tensors).encode()
        if metadata is not None:
            check_metadata(metadata)
    except (TypeError, UnicodeEncodeError):
        _check_memory(_with_printable_names(tensors), rules)
        for name in tensors:
            check_text(name, f"the key {short_repr(name)}")
        raise
    if fake:
        _check_memory(tensors, rules)


def _named(key: Any) -> str:
    return truncate(key if isinstance(key, str) else str(key))


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the class of a tensor keeps its elements elsewhere: there is a storage of so many bytes at no address."""
    if type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or isinstance(tensor, FakeTensor):
        return False
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return False  # which is said in other words
    storage = tensor.untyped_storage()
    try:
        return storage.nbytes() != 0 and storage.data_ptr() == 0
    except RuntimeError:
        return True  # as torch says it


def _without_memory(name: str, tensor: torch.Tensor) -> SafetensorError:
    """The error about a tensor of a wrapper class, with what could be saved in its place."""
    kind = type(tensor)
    if hasattr(kind, "full_tensor"):  # a DTensor
        remedy = "save its `.full_tensor()`, or its `.to_local()` with a file for each rank"
    elif hasattr(kind, "__tensor_flatten__"):
        parts = ", ".join(f"`.{part}`" for part in tensor.__tensor_flatten__()[0])
        remedy = f"save the tensors that it is made of ({parts}), or a plain tensor with its values"
    else:
        remedy = "save a plain tensor with its values"
    return SafetensorError(
        f"tensor {short_repr(name)} is a {kind.__module__}.{kind.__qualname__}, which has no memory of its own:"
        f" {remedy}"
    )


def _check_memory(tensors: Tensors, rules: dict[str, Any]) -> None:
    """What the native library checks of the tensors, also where a mode would run a fake kernel instead."""
    with _disable_current_modes():
        call(_check_save, tensors, **rules)


def _with_printable_names(tensors: dict[Any, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under names that the operators take, none lost, so that the checks before can speak of them."""
    named: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = str(key).encode("utf-8", "backslashreplace").decode()
        while name in named:
            name += "'"
        named[name] = tensor
    return named
