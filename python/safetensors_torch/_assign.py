"""load_model with assign=True: replaces the tensors of a module by those of a file.

Owns what the new tensors inherit: the class of a parameter, its attributes, requires_grad, and which names are tied.
load_state_dict assigns them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def replacements(
    state: dict[str, Any], tensors: dict[str, torch.Tensor], dropped: dict[str, str], metadata: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Returns the new tensors of a module, by their names in the file.

    Args:
        state: the module's own parameters and buffers, by their names in the file.
        tensors: the file's tensors; those that the module has no tensor for are returned as they are.
        dropped: for each name that is tied to a kept one in the module, the kept name.
        metadata: the file's, which has for each name that was dropped by the save the name that was kept.

    Returns:
        The tensors of the file, and one for each name that is tied to one of them.

    Raises:
        RuntimeError: an integer tensor for a parameter that requires a gradient, or a tied part of a tensor that is not
            contiguous.
    """
    # If the file has several names of one tensor, the last in the module's order counts, as in a copy.
    sources = {dropped.get(name, name): name for name in state if name in tensors}
    new = {name: _like(name, state[name], tensors[source]) for name, source in sources.items()}
    for name, kept in dropped.items():
        if kept in new:
            new[name] = _tied(name, state[name], kept, state[kept], new[kept])
    for name, old in state.items():
        kept = dropped.get(metadata.get(name, ""), metadata.get(name, ""))
        if name not in new and kept in new and kept in state and new[kept].shape == _shape(old):
            new[name] = new[kept]
    others = {name: tensor for name, tensor in tensors.items() if name not in state}
    return {**others, **new}


def _shape(old: Any) -> Any:
    return old.shape if isinstance(old, torch.Tensor) and not is_lazy(old) else None


def _like(name: str, old: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Returns ``tensor`` as a parameter of the class of ``old``, or unchanged if ``old`` is not one."""
    if nn.Parameter not in type(old).__mro__ or is_lazy(old):
        return tensor
    if old.requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
        raise RuntimeError(
            f"Cannot assign {tensor.dtype} to the parameter `{name}`, which requires a gradient: call"
            " requires_grad_(False) on it before, or load without assign"
        )
    parameter = torch.Tensor._make_subclass(type(old), tensor, old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    return parameter


def _tied(name: str, old: Any, kept: str, old_kept: Any, new_kept: torch.Tensor) -> torch.Tensor:
    """Returns the new tensor for ``old``, which shares the memory of ``old_kept`` and may be a part of it."""
    if old is old_kept:
        return new_kept
    base = new_kept.detach()
    if (old.shape, old.stride(), old.storage_offset()) == (
        old_kept.shape,
        old_kept.stride(),
        old_kept.storage_offset(),
    ):
        return _like(name, old, base)
    if not old_kept.is_contiguous():
        raise RuntimeError(
            f"Cannot assign to `{name}`: it is a part of `{kept}`, which is not contiguous, and a loaded tensor is."
            " Load without assign"
        )
    return _like(name, old, base.as_strided(old.shape, old.stride(), base.storage_offset() + old.storage_offset()))


def warn_of_meta(model: nn.Module) -> None:
    """Warns of non-persistent buffers on the meta device, which no file has."""
    left = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None and buffer.is_meta
    ]
    if left:
        warnings.warn(
            f"buffers of {type(model).__name__} are not part of its state_dict (persistent=False) and stay on the meta"
            f" device: {', '.join(left)}. Compute them again, or create them on another device",
            stacklevel=4,  # the caller of load_model, past the check of its keywords
        )
