"""load_model and save_model: modules whose parameters may share memory.

Owns the choice between reading straight into a module's tensors and going through its load_state_dict, and the
rollback of the latter. Which names are kept for shared memory, and what counts as missing or unexpected, the native
library decides. _module_names has prefix and rename, _module_assign what takes the place of tensors.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ._arguments import Device, Path, check_flag, encode_path, to_device
from ._checks import unseen
from ._dynamo import opaque
from ._errors import call, shortened
from ._module_assign import replacements, warn_of_meta
from ._module_names import ModuleNames, Rename
from ._ops import save_file
from ._steps import Progress, check_progress, run
from .sharded import load_opened, open_checkpoint, save_sharded

_ops = torch.ops.safetensors_torch
_tied = _ops._tied.default
_check_names = _ops._check_names.default

# What a module may replace of the machinery that load_state_dict runs through. How it gives its state to be saved is
# nothing to a load.
_METHODS = ("load_state_dict", "get_extra_state", "set_extra_state")


@opaque
def load_model(
    model: nn.Module,
    filename: Path,
    strict: bool = True,
    device: Device = "cpu",
    *,
    backend: str = "mmap",
    prefix: str = "",
    rename: Rename = None,
    assign: bool = False,
    backup: bool = True,
    variant: str | None = None,
    extra: str = "error",
    progress: Progress = None,
) -> tuple[set[str], list[str]]:
    """Loads a safetensors file, or a checkpoint of several, into a module, in place.

    The data is read straight into the memory of the module's parameters and buffers, whatever their device. Modules
    with load hooks, or methods of their own in the way of load_state_dict, get a load_file and a load_state_dict
    instead. If loading fails, the module is as it was. The exceptions: lazy modules, which load_state_dict gives their
    shape for good; an exception of a hook that runs after the load; and a load straight into the parameters that ends
    half-way, as by Ctrl-C, a broken disk, or a file that is cut short meanwhile.

    Args:
        model: the module; none of its tensors may be on the meta device, unless assign is true.
        filename: the file, or a directory or an index as for load_sharded; str, bytes or os.PathLike.
        strict: whether a missing or unexpected name is an error.
        device: where a load_state_dict finds the tensors of the file, and where assign puts them. Not where the
            module's own tensors go.
        backend: how the file is read, as for load_file.
        prefix: what the module's names in the file begin with, such as "transformer."; what the file has of other names
            is passed over. So a module can be filled from the file of a larger one.
        rename: a function from the module's names to those in the file, before which prefix is then put. None means
            the same names.
        assign: whether the module's parameters and buffers are replaced by the tensors of the file, with their dtype,
            as by load_state_dict(assign=True); for modules on the meta device. The class of a parameter, its attributes
            and requires_grad are kept. Names that share a tensor share the new one: those that do so in the module, and
            those of which the metadata of the file says that one was dropped.
        backup: whether the values of a module are first copied, to the host's memory, if it has hooks or methods that
            may fail in the middle of the load. False needs no memory for that; if the load fails, the module may then
            be changed in part. Modules without such hooks and methods never need a copy.
        variant: which checkpoint of a directory, as for load_sharded.
        extra: what is done about tensors that an index does not list, as for load_sharded.
        progress: who is told how far it is, as for load_file.

    Returns:
        The names of the module that the file does not have, and the names of the file that the module does not have;
        both as they are, or would be, in the file. Of names that share memory one suffices.

    Warns:
        UserWarning: with assign, of buffers that are not part of the state_dict and stay on the meta device.

    Raises:
        RuntimeError: a shape that does not fit; missing or unexpected names with strict; a tensor on the meta
            device; one whose storage is too small for it, or is resized during the load; an inference tensor, outside
            of inference mode; shared memory that none of its names covers.
        ValueError: two tensors for which rename returns one name.
        MemoryError: not enough memory for the backup.
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
    check_flag(assign, "assign")
    check_flag(backup, "backup")
    names = ModuleNames(type(model).__name__, prefix, rename)
    is_checkable = _is_checkable(model)
    state = _own_state(model) if assign or is_checkable else model.state_dict()
    if not assign:
        _refuse_meta(model, state)
    file = open_checkpoint(filename, backend, variant, extra)
    if assign or not is_checkable or _has_post_hooks(model):
        load = _StateDictLoad(model, state, names, strict)
        chosen = names.select(call(file.keys))
        tensors = load_opened(file, filename, target, backend, names=chosen, progress=progress)
        if assign:
            result = load.assign(tensors, call(file.metadata) or {})
            warn_of_meta(model)
            return result
        # Hooks that run after the load may change which names are at fault, and nothing else.
        needs_backup = not is_checkable or (any(load.check(file)) and strict)
        return load.copy(tensors, backup and needs_backup)
    detached = {name: value.detach() for name, value in names.state_in_file(state).items()}
    optional = list(map(names.in_file, _optional_names(model)))
    pending = call(file.start_state, detached, optional, type(model).__name__, strict, prefix)
    run(pending, pending.total, progress, "load")
    missing, unexpected = call(pending.result)
    return set(missing), unexpected


@opaque
def save_model(
    model: nn.Module,
    filename: Path,
    metadata: dict[str, str] | None = None,
    force_contiguous: bool = True,
    *,
    max_shard_size: None | int | str = None,
    prefix: str = "",
    rename: Rename = None,
    durable: bool = False,
    progress: Progress = None,
) -> None:
    """Saves the state of a module into a safetensors file, or a directory. Of names that share memory one is written.

    Args:
        model: the module.
        filename: the file, or a directory, into which the module goes as by save_sharded; str, bytes or os.PathLike. It
            is a directory if it is there as one, or if max_shard_size is given.
        metadata: text to store in the header. Each name that is left out is added to the file's metadata, with the
            name that was kept in its place, unless the caller's metadata has it; the caller's dict stays as it is.
        force_contiguous: whether tensors that are not contiguous are copied, or refused.
        max_shard_size: the most bytes of tensors in one file of a directory, as for save_sharded; None means "5GB".
        prefix: what the names in the file begin with, as for load_model.
        rename: a function from the module's names to those in the file, as for load_model.
        durable: whether to return only once the file is on the disk, as for save_file.
        progress: who is told how far it is, as for save_file.

    Raises:
        RuntimeError: shared memory that none of its names covers.
        ValueError: a tensor that is not contiguous, with force_contiguous=False; two tensors for which rename returns
            one name.
        And what save_file raises, or save_sharded.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> save_model(model, path)
        >>> sorted(load_file(path))
        ['0.bias', '0.weight', '1.bias']
    """
    names = ModuleNames(type(model).__name__, prefix, rename)
    state, path = names.state_in_file(model.state_dict()), encode_path(filename)
    options: dict[str, Any] = {
        "force_contiguous": force_contiguous,
        "shared": "keep_one",
        "durable": durable,
        "progress": progress,
    }
    try:
        if max_shard_size is None and not os.path.isdir(path):
            save_file(state, path, metadata, **options)
        else:
            size = "5GB" if max_shard_size is None else max_shard_size
            save_sharded(state, path, metadata, max_shard_size=size, **options)
    except ValueError as error:
        if not str(error).startswith("You are trying to save a non contiguous tensor"):
            raise
        raise ValueError(
            f"{error} Or use save_model(..., force_contiguous=True), read the docs for potential caveats."
        ) from None


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not is_lazy(value) and value.layout == torch.strided


def _dense(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    with unseen():
        return {name: value for name, value in state.items() if _is_dense(value)}


def _refuse_meta(model: nn.Module, state: dict[str, Any]) -> None:
    for name, value in state.items():
        with unseen():
            is_meta = isinstance(value, torch.Tensor) and value.is_meta and not is_lazy(value)
        if is_meta:
            raise RuntimeError(
                f"Cannot load into {type(model).__name__}: its tensor `{shortened(name)}` is on the meta device and"
                " has no memory. Pass assign=True, which makes its parameters and buffers from the tensors of the file"
            )


def _own_state(model: nn.Module) -> dict[str, Any]:
    """What load_state_dict looks for in a module and fills, by name; whatever state_dict makes of it."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules(remove_duplicate=False)
        for table, left_out in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set))
        for name, value in table.items()
        if value is not None and name not in left_out
    }


def _is_checkable(model: nn.Module) -> bool:
    """Whether all that load_state_dict does before its last hooks is to write into the tensors of the module."""
    return all(map(_is_plain_module, model.modules())) and all(
        not is_lazy(value) and _is_unseen(type(value)) and _is_plain_tensor(value.detach())
        for value in _own_state(model).values()
    )


def _is_unseen(kind: type[torch.Tensor]) -> bool:
    """Whether tensors of this class are copied to as others are: no ``__torch_function__`` of its own looks on."""
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


def _has_post_hooks(model: nn.Module) -> bool:
    return any(module.__dict__.get("_load_state_dict_post_hooks") for module in model.modules())


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


class _StateDictLoad:
    """A load through a module's load_state_dict."""

    def __init__(self, model: nn.Module, state: dict[str, Any], names: ModuleNames, strict: bool) -> None:
        self._model, self._state, self._names, self._strict = model, state, names, strict
        self._in_file = names.state_in_file(state)

    def check(self, file: Any) -> tuple[list[str], list[str]]:
        """Missing and unexpected names of a module that can be checked; what else is wrong with it is raised."""
        detached = {name: value.detach() for name, value in self._in_file.items()}
        optional = list(map(self._names.in_file, _optional_names(self._model)))
        class_name = type(self._model).__name__
        pending = call(file.start_state, detached, optional, class_name, False, self._names.prefix)
        result = call(pending.result)
        pending.cancel()
        return result

    def copy(self, tensors: dict[str, torch.Tensor], with_backup: bool) -> tuple[set[str], list[str]]:
        """Has ``tensors`` copied to those of the module."""
        dropped = call(_tied, _dense(self._in_file), list(tensors))
        return self._load(tensors, dropped, set(), _Snapshot(self._model, with_values=with_backup), assign=False)

    def assign(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[set[str], list[str]]:
        """Has ``tensors`` take the place of those of the module."""
        dropped = call(_tied, _dense(self._in_file), list(tensors))
        new = replacements(self._in_file, tensors, dropped, metadata)
        snapshot = _Snapshot(self._model, with_values=False)
        return self._load(new, dropped, new.keys() - tensors.keys(), snapshot, assign=True)

    def _load(
        self,
        tensors: dict[str, torch.Tensor],
        dropped: dict[str, str],
        tied: set[str],
        snapshot: _Snapshot,
        assign: bool,
    ) -> tuple[set[str], list[str]]:
        """``tied`` are names that the file does not have."""
        # With assign, the state is that of tensors alone; a module may have other entries too.
        known = {**self._model.state_dict(), **self._state} if assign else self._state
        in_module = self._names.to_module(known, tensors)
        in_file = {name: given for given, name in in_module.items()}
        options = {"assign": True} if assign else {}
        try:
            given = {in_module[name]: tensor for name, tensor in tensors.items() if name in in_module}
            result = self._model.load_state_dict(given, strict=False, **options)
            missing = set(map(self._names.in_file, result.missing_keys))
            unexpected = {in_file.get(name) or self._names.in_file(name) for name in result.unexpected_keys}
            unexpected.update(name for name in tensors if name not in in_module)
            # A file with a tied name beside the kept one was not made from such a model.
            unexpected.update(name for name in dropped if name not in missing and name not in tied)
            missing.difference_update(dropped)
            faults = sorted(missing), sorted(unexpected)
            if self._strict:
                call(_check_names, type(self._model).__name__, *faults, self._names.prefix)
        except BaseException as error:
            failures = snapshot.restore()
            if failures and hasattr(error, "add_note"):  # Python 3.11
                error.add_note("Not all of the module is as it was before the load: " + "; ".join(map(str, failures)))
            raise
        return missing, faults[1]


class _Snapshot:
    """The tensors and extra state of a module at one moment: which objects they are, and perhaps their values."""

    def __init__(self, model: nn.Module, with_values: bool) -> None:
        self._tables = [(table, dict(table)) for module in model.modules() for table in _tables(module)]
        tensors = {id(value): value for _, values in self._tables for value in values.values() if value is not None}
        copied = [tensor for tensor in tensors.values() if with_values and not is_lazy(tensor)]
        try:
            with unseen():
                self._values = [(tensor, _copied(tensor)) for tensor in copied]
        except (MemoryError, RuntimeError) as error:
            nbytes = sum(tensor.nbytes for tensor in copied)
            raise MemoryError(
                f"Cannot copy the {nbytes} bytes of {type(model).__name__}, which are put back if the load fails"
                f" ({error}): pass backup=False to load without a copy"
            ) from error
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
        with torch.no_grad(), unseen():
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


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, as a device may have no room for two; of tensors of other kinds where they are."""
    detached = tensor.detach()
    return detached.to("cpu", copy=True) if _is_plain_tensor(detached) else detached.clone()


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether nothing has to be copied. The version of a tensor does not tell: a change through ``.data`` keeps it."""
    try:
        right = right.to(left.device)
        return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))
    except Exception:  # a layout or class of tensor that has no bytes to look at
        return False


def _tables(module: nn.Module) -> Iterator[dict[str, torch.Tensor | None]]:
    yield module._parameters
    yield module._buffers
