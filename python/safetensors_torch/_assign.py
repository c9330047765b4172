"""load_model with assign=True: the tensors of a module are replaced by those of a file.

Owns what the new tensors have of the old ones: the class of a parameter and its attributes, requires_grad, and which
of them are one. load_state_dict puts them in place.
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
    """What takes the place of the tensors of a module.

    Args:
        state: the module's own parameters and buffers, by their names in the file.
        tensors: what the file has; taken as it is where the module has no tensor of the name.
        dropped: of names that share memory in the module, those that are not kept, each with the one that is.
        metadata: that of the file, which has for each name that was dropped when it was saved the one that was kept.

    Returns:
        The new tensors by name; names that share memory with one that the file has are among them.

    Raises:
        RuntimeError: an integer tensor for a parameter that requires a gradient, or a part of a tensor whose layout the
            file cannot have.
    """
    # Of several names of one tensor that the file has, the last in the module's order counts, as in a copy.
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
    """``tensor`` as a parameter of the class of ``old``, if that is one. Others load_state_dict makes what they are."""
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
    """What ``old`` becomes, which has its memory in common with ``old_kept``, of which it may be a part."""
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
            f"Cannot assign to `{name}`: it is a part of `{kept}`, which is not contiguous, as a loaded tensor is. Load"
            " without assign"
        )
    return _like(name, old, base.as_strided(old.shape, old.stride(), base.storage_offset() + old.storage_offset()))


def warn_of_meta(model: nn.Module) -> None:
    """Warns of buffers that no file has, and that are on the meta device still."""
    left = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None and buffer.is_meta
    ]
    if left:
        warnings.warn(
            f"buffers of {type(model).__name__} are not part of its state_dict (persistent=False) and stay on the meta"
            f" device: {', '.join(left)}. Compute them anew, or make them on their device",
            stacklevel=3,
        )
