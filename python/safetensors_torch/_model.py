"""load_model and save_model: modules whose parameters may share memory.

Owns the choice between reading straight into a module's tensors and going through its load_state_dict. The native
library decides which of several tied names is kept, and which names are missing or unexpected.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._arguments import Device, Path, check_bool, encode_path, to_device
from ._assign import warn_of_meta
from ._errors import call, truncate
from ._keywords import explains_keywords
from ._load_state_dict import StateDictLoad
from ._locations import RemotePath, located
from ._module_state import allows_direct_load, has_post_hooks, optional_names, own_state
from ._name_mapping import NameMapping, Rename
from ._progress import Progress, check_progress, run
from ._save import save_file
from ._save_checks import DisableTorchFunction
from ._sharded import load_opened, open_checkpoint, save_sharded
from ._tracing import dynamo_disable


@dynamo_disable
@explains_keywords
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
    filesystem: Any = None,
) -> tuple[set[str], list[str]]:
    """Loads a safetensors file, or a checkpoint of several files, into a module, in place.

    The data is read straight into the memory of the module's parameters and buffers, on any device. Modules with load
    hooks or loading methods of their own get a load_file and a load_state_dict instead. If the load fails, the module
    is as it was, with three exceptions: lazy modules keep the shape that load_state_dict gave them; a hook that runs
    after the load raises; and a direct load stops half-way (Ctrl-C, a disk error, a file truncated during the load).

    Args:
        model: the module. Its tensors may be on the meta device only with assign.
        filename: the file, or a directory or an index as for load_sharded; str, bytes or os.PathLike, or a URL.
        strict: whether a missing or unexpected name is an error.
        device: the device to load the tensors of the file to, for a load_state_dict or assign. A direct load leaves
            the module's tensors on their devices.
        backend: "mmap" or "pread", as for load_file.
        prefix: the beginning of the module's names in the file, such as "transformer."; other names of the file are
            ignored. So a module can load its part of a larger model's file.
        rename: a function from the module's names to those in the file, to which prefix is then prepended. None means
            the same names.
        assign: whether to replace the module's parameters and buffers by the tensors of the file, with their dtype, as
            load_state_dict(assign=True) does; for modules on the meta device. Parameters keep their class, attributes
            and requires_grad. Names that are tied in the module, or by the file's metadata, share one new tensor.
        backup: whether to copy the module's values to host memory first, if it has hooks or methods that may fail
            during the load. False saves that memory; a failed load may then leave the module partly changed. Other
            modules need no copy.
        variant: the variant to load from a directory, as for load_sharded.
        extra: the treatment of tensors that an index does not list, as for load_sharded.
        progress: a bar or a function, as for load_file.
        filesystem: what ``filename`` is in, as for load_file.

    Returns:
        The names of the module that the file lacks, and the names of the file that the module lacks, both as in the
        file. One of several tied names suffices.

    Warns:
        UserWarning: with assign, non-persistent buffers stay on the meta device.

    Raises:
        RuntimeError: a shape does not fit; strict and names are missing or unexpected; a tensor on the meta device; a
            storage that is too small for its tensor, or is resized during the load; an inference tensor outside of
            inference mode; shared memory that none of its names covers.
        ValueError: rename returns one name for two tensors.
        MemoryError: not enough memory for the backup.
        SafetensorError, OSError, ValueError: as load_file and load_sharded.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> save_file({"weight": torch.ones(2, 3), "scale": torch.ones(1)}, path)
        >>> load_model(model, path, strict=False)
        ({'bias'}, ['scale'])
        >>> model.weight[0]
        tensor([1., 1., 1.], grad_fn=<SelectBackward0>)
    """
    _check_model(model, filename, "load_model")
    target, progress = to_device(device), check_progress(progress)
    check_bool(assign, "assign")
    check_bool(backup, "backup")
    names = NameMapping(type(model).__name__, prefix, rename)
    is_direct = allows_direct_load(model)
    state = own_state(model) if assign or is_direct else model.state_dict()
    if not assign:
        _refuse_meta(model, state)
    filename = located(filename, filesystem)
    file = open_checkpoint(filename, backend, variant, extra)
    if assign or not is_direct or has_post_hooks(model):
        load = StateDictLoad(model, state, names, strict)
        chosen = names.select(call(file.keys))
        tensors = load_opened(file, filename, target, backend, names=chosen, progress=progress)
        if assign:
            result = load.assign(tensors, call(file.metadata) or {})
            warn_of_meta(model)
            return result
        # Hooks that run after the load can only change which names are missing or unexpected.
        needs_backup = not is_direct or (any(load.check(file)) and strict)
        return load.copy(tensors, backup and needs_backup)
    detached = {name: value.detach() for name, value in names.state_in_file(state).items()}
    optional = list(map(names.in_file, optional_names(model)))
    pending = call(file.start_state, detached, optional, type(model).__name__, strict, prefix)
    run(pending, progress, "load")
    missing, unexpected = call(pending.result)
    return set(missing), unexpected


@dynamo_disable
@explains_keywords
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
    filesystem: Any = None,
) -> None:
    """Saves the state of a module into a safetensors file or a directory. Writes one of several tied names.

    Args:
        model: the module.
        filename: the file, or the directory for save_sharded; str, bytes or os.PathLike, or a URL. It is a directory
            if max_shard_size is given, if one exists there, or if a URL ends with a slash.
        metadata: text to store in the header. The file's metadata also maps each name that was dropped to the name that
            was kept, unless the caller's metadata has that key. The caller's dict does not change.
        force_contiguous: whether to copy tensors that are not contiguous; False refuses them.
        max_shard_size: the most bytes of tensors in one file of a directory, as for save_sharded; None means "5GB".
        prefix: the beginning of the names in the file, as for load_model.
        rename: a function from the module's names to those in the file, as for load_model.
        durable: whether to return only after the file is on disk, as for save_file.
        progress: a bar or a function, as for save_file.
        filesystem: what ``filename`` is in, as for load_file.

    Raises:
        RuntimeError: shared memory that none of its names covers.
        ValueError: a tensor that is not contiguous, with force_contiguous=False; rename returns one name for two
            tensors.
        And what save_file or save_sharded raises.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> save_model(model, path)
        >>> sorted(load_file(path))
        ['0.bias', '0.weight', '1.bias']
    """
    _check_model(model, filename, "save_model")
    names = NameMapping(type(model).__name__, prefix, rename)
    state, target = names.state_in_file(model.state_dict()), located(filename, filesystem)
    if isinstance(target, RemotePath):
        is_directory = target.path.endswith("/")
    else:
        is_directory = os.path.isdir(encode_path(target))
    options: dict[str, Any] = {
        "force_contiguous": force_contiguous,
        "shared": "keep_one",
        "durable": durable,
        "progress": progress,
    }
    try:
        if max_shard_size is None and not is_directory:
            save_file(state, target, metadata, **options)
        else:
            size = "5GB" if max_shard_size is None else max_shard_size
            save_sharded(state, target, metadata, max_shard_size=size, **options)
    except ValueError as error:
        if not str(error).startswith("You are trying to save a non contiguous tensor"):
            raise
        raise ValueError(
            f"{error} Or use save_model(..., force_contiguous=True), read the docs for potential caveats."
        ) from None


def _check_model(model: Any, filename: Any, function: str) -> None:
    """Raises TypeError if ``model`` is not a module, or something that works like one."""
    if hasattr(model, "state_dict") and not isinstance(model, type):
        return
    if isinstance(filename, nn.Module):
        remedy = f"the order of the arguments is {function}(model, filename)"
    elif isinstance(model, type):
        remedy = "pass an instance of the class"
    elif isinstance(model, Mapping):
        remedy = "load_file(filename) returns a dict for load_state_dict, and save_file(tensors, filename) saves one"
    else:
        remedy = f"call {function}(model, filename)"
    raise TypeError(f"model must be a torch.nn.Module, not {_class_name(model)}; {remedy}")


def _class_name(model: Any) -> str:
    return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__


def _refuse_meta(model: nn.Module, state: dict[str, Any]) -> None:
    for name, value in state.items():
        with DisableTorchFunction():
            is_meta = isinstance(value, torch.Tensor) and value.is_meta and not is_lazy(value)
        if is_meta:
            raise RuntimeError(
                f"Cannot load into {type(model).__name__}: its tensor `{truncate(name)}` is on the meta device and"
                " has no memory. Pass assign=True, which replaces its parameters and buffers by the tensors of the file"
            )
