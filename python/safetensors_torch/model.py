"""load_model and save_model: modules whose parameters may share memory.

Owns the choice between reading straight into a module's tensors and going through its load_state_dict, and the
rollback of the latter. Which names are kept for shared memory, and what counts as missing or unexpected, the native
library decides. _module_names has prefix and rename, _module_assign what takes the place of tensors.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._arguments import Device, Path, check_bool, encode_path, to_device
from ._assign import warn_of_meta
from ._errors import call, truncate
from ._load_state_dict import StateDictLoad
from ._module_state import allows_direct_load, has_post_hooks, optional_names, own_state
from ._name_mapping import NameMapping, Rename
from ._progress import Progress, check_progress, run
from ._save import save_file
from ._save_checks import DisableTorchFunction
from ._tracing import dynamo_disable
from .sharded import load_opened, open_checkpoint, save_sharded


@dynamo_disable
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
    check_bool(assign, "assign")
    check_bool(backup, "backup")
    names = NameMapping(type(model).__name__, prefix, rename)
    is_direct = allows_direct_load(model)
    state = own_state(model) if assign or is_direct else model.state_dict()
    if not assign:
        _refuse_meta(model, state)
    file = open_checkpoint(filename, backend, variant, extra)
    if assign or not is_direct or has_post_hooks(model):
        load = StateDictLoad(model, state, names, strict)
        chosen = names.select(call(file.keys))
        tensors = load_opened(file, filename, target, backend, names=chosen, progress=progress)
        if assign:
            result = load.assign(tensors, call(file.metadata) or {})
            warn_of_meta(model)
            return result
        # Hooks that run after the load may change which names are at fault, and nothing else.
        needs_backup = not is_direct or (any(load.check(file)) and strict)
        return load.copy(tensors, backup and needs_backup)
    detached = {name: value.detach() for name, value in names.state_in_file(state).items()}
    optional = list(map(names.in_file, optional_names(model)))
    pending = call(file.start_state, detached, optional, type(model).__name__, strict, prefix)
    run(pending, pending.total, progress, "load")
    missing, unexpected = call(pending.result)
    return set(missing), unexpected


@dynamo_disable
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
    names = NameMapping(type(model).__name__, prefix, rename)
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


def _refuse_meta(model: nn.Module, state: dict[str, Any]) -> None:
    for name, value in state.items():
        with DisableTorchFunction():
            is_meta = isinstance(value, torch.Tensor) and value.is_meta and not is_lazy(value)
        if is_meta:
            raise RuntimeError(
                f"Cannot load into {type(model).__name__}: its tensor `{truncate(name)}` is on the meta device and"
                " has no memory. Pass assign=True, which makes its parameters and buffers from the tensors of the file"
            )
