"""The state of a module: its own tensors by name, and whether a load may write straight into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ._save_checks import DisableTorchFunction

# Methods that load_state_dict calls and that a module may override.
_METHODS = ("load_state_dict", "get_extra_state", "set_extra_state")


def own_state(model: nn.Module) -> dict[str, Any]:
    """Returns the parameters and persistent buffers of a module by name, past any override of state_dict."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules(remove_duplicate=False)
        for table, excluded in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set))
        for name, value in table.items()
        if value is not None and name not in excluded
    }


def allows_direct_load(model: nn.Module) -> bool:
    """Returns whether load_state_dict, before its post hooks, would only copy into the tensors of the module."""
    return all(map(_is_plain_module, model.modules())) and all(
        not is_lazy(value) and _has_default_torch_function(type(value)) and is_plain_tensor(value.detach())
        for value in own_state(model).values()
    )


def _has_default_torch_function(kind: type[torch.Tensor]) -> bool:
    """Returns whether a copy into tensors of this class calls no ``__torch_function__`` of its own."""
    return kind is torch.Tensor or kind.__torch_function__ is nn.Parameter.__torch_function__


def _is_plain_module(module: nn.Module) -> bool:
    kind = type(module)
    load = kind._load_from_state_dict
    if load is not nn.Module._load_from_state_dict and load is not _NormBase._load_from_state_dict:
        return False
    own = module.__dict__
    return (
        all(getattr(kind, name) is getattr(nn.Module, name) for name in _METHODS)
        and not any(name in own for name in (*_METHODS, "_load_from_state_dict"))
        and not own.get("_load_state_dict_pre_hooks")
    )


def has_post_hooks(model: nn.Module) -> bool:
    return any(module.__dict__.get("_load_state_dict_post_hooks") for module in model.modules())


def is_plain_tensor(value: Any) -> bool:
    return (
        type(value) is torch.Tensor
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
    )


def optional_names(model: nn.Module) -> list[str]:
    """Returns names that BatchNorm does not require, because files from before torch 0.4.1 lack them."""
    return [
        f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _NormBase) and module.num_batches_tracked is not None
    ]


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not is_lazy(value) and value.layout == torch.strided


def dense_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    with DisableTorchFunction():
        return {name: value for name, value in state.items() if _is_dense(value)}
