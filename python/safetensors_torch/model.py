"""load_model and save_model: modules whose parameters may share memory.

Owns the choice between reading straight into a module's tensors and going through its load_state_dict, and the
rollback of the latter. Which names are kept for shared memory, and what counts as missing or unexpected, the native
library decides.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any, Optional, Union

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ._arguments import Device, Path, encode_path, to_device
from ._dynamo import opaque
from ._errors import call
from ._ops import save_file
from ._steps import Progress, check_progress, run
from .sharded import load_sharded, open_checkpoint, save_sharded

_ops = torch.ops.safetensors_torch
_tied = _ops._tied.default

# What a module may replace of the machinery that load_state_dict runs through.
_METHODS = (
    "load_state_dict",
    "state_dict",
    "_save_to_state_dict",
    "get_extra_state",
    "set_extra_state",
)
_HOOKS = (
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


@opaque
def load_model(
    model: nn.Module,
    filename: Path,
    strict: bool = True,
    device: Device = "cpu",
    *,
    backend: str = "mmap",
    progress: Progress = None,
) -> tuple[set[str], list[str]]:
    """Loads a safetensors file, or a checkpoint of several, into a module, in place.

    The data is read straight into the memory of the module's parameters and buffers, whatever their device. Modules
    with hooks or methods of their own in the way of load_state_dict get a load_file and a load_state_dict instead;
    that path keeps a copy of the module's tensors until it has succeeded. If loading fails, the module is as it was.
    Two cases excepted: lazy modules, which load_state_dict gives their shape for good; and a load straight into the
    parameters that ends half-way, as by Ctrl-C, a broken disk, or a file that is cut short meanwhile.

    Args:
        model: the module; none of its tensors may be on the meta device.
        filename: the file, or a folder or an index as for load_sharded; str, bytes or os.PathLike.
        strict: whether a missing or unexpected name is an error.
        device: where a load_state_dict finds the tensors of the file. Not where the module's own tensors go.
        backend: how the file is read, as for load_file.
        progress: who is told how far it is, as for load_file.

    Returns:
        The names of the module that the file does not have, and the names of the file that the module does not have.
        Of names that share memory one suffices.

    Raises:
        RuntimeError: a shape that does not fit; missing or unexpected names with strict; a tensor on the meta
            device; shared memory that none of its names covers.
        SafetensorError, OSError, ValueError: what load_file raises, and load_sharded.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> save_file({"weight": torch.ones(2, 3), "scale": torch.ones(1)}, path)
        >>> load_model(model, path, strict=False)
        ({'bias'}, ['scale'])
        >>> model.weight[0]
        tensor([1., 1., 1.], grad_fn=<SelectBackward0>)
    """
    target, progress = to_device(device), check_progress(progress)
    state = model.state_dict()
    _refuse_meta(model, state)
    if not _is_plain(model, state):
        return _load_through_state_dict(model, state, filename, strict, target, backend, progress)
    file = open_checkpoint(filename, backend)
    pending = call(file.start_state, state, _optional_names(model), type(model).__name__, strict, "")
    run(pending, pending.total, progress, "load")
    missing, unexpected = call(pending.result)
    return set(missing), unexpected


@opaque
def save_model(
    model: nn.Module,
    filename: Path,
    metadata: Optional[dict[str, str]] = None,
    force_contiguous: bool = True,
    *,
    max_shard_size: Union[None, int, str] = None,
    durable: bool = False,
    progress: Progress = None,
) -> None:
    """Saves the state of a module into a safetensors file, or a folder. Of names that share memory one is written.

    Args:
        model: the module.
        filename: the file, or a folder, into which the module goes as by save_sharded; str, bytes or os.PathLike. It
            is a folder if it is there as one, or if max_shard_size is given.
        metadata: text to store in the header. Each name that is left out is added to the file's metadata, with the
            name that was kept in its place, unless the caller's metadata has it; the caller's dict stays as it is.
        force_contiguous: whether tensors that are not contiguous are copied, or refused.
        max_shard_size: the most bytes of tensors in one file of a folder, as for save_sharded; None means "5GB".
        durable: whether to return only once the file is on the disk, as for save_file.
        progress: who is told how far it is, as for save_file.

    Raises:
        RuntimeError: shared memory that none of its names covers.
        ValueError: a tensor that is not contiguous, with force_contiguous=False.
        And what save_file raises, or save_sharded.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> save_model(model, path)
        >>> sorted(load_file(path))
        ['0.bias', '0.weight', '1.bias']
    """
    state = dict(model.state_dict())
    dropped = call(_tied, _dense(state), [])
    if dropped:
        if metadata is not None and not isinstance(metadata, dict):
            raise TypeError(f"metadata must be a dict of str to str or None, not {type(metadata).__name__}")
        metadata = {**dropped, **(metadata or {})}
        for name in dropped:
            del state[name]
    if force_contiguous:
        state = {name: value.contiguous() if _is_dense(value) else value for name, value in state.items()}
    path = encode_path(filename)
    try:
        if max_shard_size is None and not os.path.isdir(path):
            save_file(state, path, metadata=metadata, durable=durable, progress=progress)
        else:
            size = "5GB" if max_shard_size is None else max_shard_size
            save_sharded(state, path, metadata, max_shard_size=size, durable=durable, progress=progress)
    except ValueError as error:
        # Of the ValueErrors only that of strides: not a UnicodeEncodeError, nor one about what is no dense tensor.
        if type(error) is not ValueError or not all(map(_is_dense, state.values())):
            raise
        if all(value.is_contiguous() for value in state.values()):
            raise
        raise ValueError(
            f"{error} Or use save_model(..., force_contiguous=True), read the docs for potential caveats."
        ) from None


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not is_lazy(value) and value.layout == torch.strided


def _dense(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if _is_dense(value)}


def _refuse_meta(model: nn.Module, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_meta and not is_lazy(value):
            raise RuntimeError(
                f"Cannot load into {type(model).__name__}: its tensor `{name}` is on the meta device and has no"
                " memory. Give the model memory first, with model.to_empty(device=...)"
            )


def _is_plain(model: nn.Module, state: dict[str, Any]) -> bool:
    """Whether writing into the tensors of ``state`` is all that load_state_dict would do."""
    return all(map(_is_plain_module, model.modules())) and all(map(_is_plain_tensor, state.values()))


def _is_plain_module(module: nn.Module) -> bool:
    kind = type(module)
    load = kind._load_from_state_dict
    if load is not nn.Module._load_from_state_dict and load is not _NormBase._load_from_state_dict:
        return False
    own = module.__dict__
    return (
        all(getattr(kind, name) is getattr(nn.Module, name) for name in _METHODS)
        and not any(name in own for name in (*_METHODS, "_load_from_state_dict"))
        and not any(own.get(name) for name in _HOOKS)
    )


def _is_plain_tensor(value: Any) -> bool:
    return (
        type(value) is torch.Tensor
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
    )


def _optional_names(model: nn.Module) -> list[str]:
    """Names that files from before torch 0.4.1 lack, and that BatchNorm therefore does not miss."""
    return [
        f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _NormBase) and module.num_batches_tracked is not None
    ]


def _load_through_state_dict(
    model: nn.Module,
    state: dict[str, Any],
    filename: Path,
    strict: bool,
    device: torch.device,
    backend: str,
    progress: Progress,
) -> tuple[set[str], list[str]]:
    tensors = load_sharded(filename, device, backend=backend, progress=progress)
    dropped = call(_tied, _dense(state), list(tensors))
    snapshot = _Snapshot(model)
    try:
        result = model.load_state_dict(tensors, strict=False)
        missing = set(result.missing_keys)
        # A file with a tied name beside the kept one was not made from such a model.
        unexpected = sorted([*result.unexpected_keys, *(name for name in dropped if name not in missing)])
        missing.difference_update(dropped)
        if strict and (missing or unexpected):
            raise RuntimeError(_strict_error(model, missing, unexpected))
    except BaseException as error:
        faults = snapshot.restore()
        if faults and hasattr(error, "add_note"):  # Python 3.11
            error.add_note("Not all of the module is as it was before the load: " + "; ".join(map(str, faults)))
        raise
    return missing, unexpected


def _strict_error(model: nn.Module, missing: set[str], unexpected: list[str]) -> str:
    text = f"Error(s) in loading state_dict for {type(model).__name__}:"
    for what, names in (("Missing", sorted(missing)), ("Unexpected", unexpected)):
        if names:
            quoted = ", ".join(f'"{name}"' for name in names)
            text += f"\n    {what} key(s) in state_dict: {quoted}"
    return text


class _Snapshot:
    """The tensors and extra state of a module at one moment: which objects they are, and a copy of their values."""

    def __init__(self, model: nn.Module) -> None:
        self._tables = [(table, dict(table)) for module in model.modules() for table in _tables(module)]
        tensors = {id(value): value for _, values in self._tables for value in values.values() if value is not None}
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors.values() if not is_lazy(tensor)]
        self._extra = [
            (module, copy.deepcopy(module.get_extra_state()))
            for module in model.modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]

    def restore(self) -> list[Exception]:
        """Puts back as much as can be, and gives what went wrong with the rest."""
        faults = []
        for table, values in self._tables:
            table.clear()
            table.update(values)
        with torch.no_grad():
            for tensor, value in self._values:
                try:
                    if not _same_bits(tensor, value):
                        tensor.detach().copy_(value)
                except Exception as error:
                    faults.append(error)
        for module, extra in self._extra:
            try:
                module.set_extra_state(extra)
            except Exception as error:
                faults.append(error)
        return faults


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether nothing has to be copied. The version of a tensor does not tell: a change through ``.data`` keeps it."""
    try:
        return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))
    except Exception:  # a layout or class of tensor that has no bytes to look at
        return False


def _tables(module: nn.Module) -> Iterator[dict[str, Optional[torch.Tensor]]]:
    yield module._parameters
    yield module._buffers
