"""Checks of tensors before a save that need the Python objects: names, classes and metadata.

Owns these checks and the order of their errors. The native library checks the memory and the dtypes of the tensors.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._python_dispatch import _disable_current_modes

from ._arguments import Metadata, check_metadata, check_name
from ._errors import SafetensorError, call, short_repr, truncate

_check_save = torch.ops.safetensors_torch._check_save.default

# Nearly all tensors have these classes, which need no further check.
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)

Tensors = dict[str, torch.Tensor]

# Within its blocks no operation on a tensor reaches the __torch_function__ of a class or a mode.
DisableTorchFunction = torch._C.DisableTorchFunction


def check_tensors(tensors: Any, metadata: Any, call_text: str, **rules: Any) -> tuple[Tensors, Metadata]:
    """Checks what is to be saved. Errors about names come last, after those of the native library.

    Args:
        tensors: the tensors by name.
        metadata: the text for the header.
        call_text: the call, with its arguments in order, for the error about another type.
        rules: force_contiguous and shared, for the native library.

    Returns:
        Copies of both dicts, which no other thread changes.
    """
    if not isinstance(tensors, dict):
        raise ValueError(
            f"Expected a dict of [str, torch.Tensor] but received {type(tensors)}; {_remedy(tensors, call_text)}"
        )
    tensors = dict(tensors)
    if isinstance(metadata, dict):
        metadata = dict(metadata)
    with DisableTorchFunction():
        _check_tensors(tensors, metadata, rules)
    return tensors, metadata


def _remedy(tensors: Any, call_text: str) -> str:
    """Returns what to do with ``tensors``, which are not a dict."""
    if isinstance(tensors, (str, bytes, os.PathLike)):
        return f"the order of the arguments is {call_text}"
    if isinstance(tensors, torch.nn.Module):
        return "save_model(model, filename) saves a module"
    if isinstance(tensors, torch.Tensor):
        return 'pass {"name": tensor}'
    return f"call {call_text} with a dict"


def _check_tensors(tensors: dict[Any, Any], metadata: Any, rules: dict[str, Any]) -> None:
    fake, wrapper = False, None
    for name, tensor in tensors.items():
        if type(tensor) in _PLAIN_CLASSES:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"Key `{truncate(str(name))}` is invalid, expected torch.Tensor but received {type(tensor)};"
                " convert it with torch.as_tensor(), or store text in metadata"
            )
        if isinstance(tensor, UninitializedTensorMixin):
            raise ValueError(
                f"Key `{truncate(str(name))}` is invalid: a lazy module has not given it a shape yet. Run the module"
                " once"
            )
        if isinstance(tensor, FakeTensor):
            fake = True
        elif wrapper is None and _is_wrapper(tensor):
            wrapper = name
    if wrapper is not None:
        others = {name: tensor for name, tensor in tensors.items() if not _is_wrapper(tensor)}
        _check_memory(_with_printable_names(others), rules)
        raise _wrapper_error(wrapper, tensors[wrapper])
    try:
        # One pass in C over all names, instead of two checks for each.
        "".join(tensors).encode()
        check_metadata(metadata)
    except (TypeError, UnicodeEncodeError):
        _check_memory(_with_printable_names(tensors), rules)
        for name in tensors:
            check_name(name)
        raise
    if fake:
        _check_memory(tensors, rules)


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Returns whether the class of a tensor keeps its elements elsewhere: its storage has a size and no address."""
    if type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or isinstance(tensor, FakeTensor):
        return False
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return False  # these have errors of their own
    storage = tensor.untyped_storage()
    try:
        return storage.nbytes() != 0 and storage.data_ptr() == 0
    except RuntimeError:
        return True  # torch refuses to return an address


def _wrapper_error(name: str, tensor: torch.Tensor) -> SafetensorError:
    kind = type(tensor)
    if hasattr(kind, "full_tensor"):  # a DTensor
        remedy = "save its `.full_tensor()`, or its `.to_local()` with a file for each rank"
    elif hasattr(kind, "__tensor_flatten__"):
        parts = ", ".join(f"`.{part}`" for part in tensor.__tensor_flatten__()[0])
        remedy = f"save its inner tensors ({parts}), or a plain tensor with its values"
    else:
        remedy = "save a plain tensor with its values"
    return SafetensorError(
        f"tensor {short_repr(name)} is a {kind.__module__}.{kind.__qualname__}, which has no memory of its own:"
        f" {remedy}"
    )


def _check_memory(tensors: Tensors, rules: dict[str, Any]) -> None:
    """Has the native library check the tensors, even if a mode would run a fake kernel instead."""
    with _disable_current_modes():
        call(_check_save, tensors, **rules)


def _with_printable_names(tensors: dict[Any, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors under distinct names that the operators accept, so that their errors can name the tensors."""
    named: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = str(key).encode("utf-8", "backslashreplace").decode()
        while name in named:
            name += "'"
        named[name] = tensor
    return named
