"""load_model through a module's load_state_dict, for modules with hooks or loading methods of their own.

Owns the backup of the module, and the rollback if the load fails.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._assign import replacements
from ._errors import call
from ._module_state import dense_tensors, is_plain_tensor, optional_names
from ._name_mapping import NameMapping
from ._save_checks import DisableTorchFunction

_ops = torch.ops.safetensors_torch
_tied = _ops._tied.default
_check_names = _ops._check_names.default


class StateDictLoad:
    """A load through a module's load_state_dict."""

    def __init__(self, model: nn.Module, state: dict[str, Any], names: NameMapping, strict: bool) -> None:
        self._model, self._state, self._names, self._strict = model, state, names, strict
        self._in_file = names.state_in_file(state)

    def check(self, file: Any) -> tuple[list[str], list[str]]:
        """Returns the missing and the unexpected names; raises the other errors. For modules with a direct load."""
        detached = {name: value.detach() for name, value in self._in_file.items()}
        optional = list(map(self._names.in_file, optional_names(self._model)))
        class_name = type(self._model).__name__
        pending = call(file.start_state, detached, optional, class_name, False, self._names.prefix)
        result = call(pending.result)
        pending.cancel()
        return result

    def copy(self, tensors: dict[str, torch.Tensor], with_values: bool) -> tuple[set[str], list[str]]:
        """Copies ``tensors`` into those of the module."""
        dropped = call(_tied, dense_tensors(self._in_file), list(tensors))
        return self._load(tensors, dropped, set(), _Backup(self._model, with_values=with_values), assign=False)

    def assign(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[set[str], list[str]]:
        """Replaces the tensors of the module by ``tensors``."""
        dropped = call(_tied, dense_tensors(self._in_file), list(tensors))
        new = replacements(self._in_file, tensors, dropped, metadata)
        backup = _Backup(self._model, with_values=False)
        return self._load(new, dropped, new.keys() - tensors.keys(), backup, assign=True)

    def _load(
        self,
        tensors: dict[str, torch.Tensor],
        dropped: dict[str, str],
        tied: set[str],
        backup: _Backup,
        assign: bool,
    ) -> tuple[set[str], list[str]]:
        """Runs load_state_dict. ``tied`` are names that the file lacks."""
        # With assign the state has only tensors; the module may have other entries.
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
            # The file of such a model does not have both tied names.
            unexpected.update(name for name in dropped if name not in missing and name not in tied)
            missing.difference_update(dropped)
            faults = sorted(missing), sorted(unexpected)
            if self._strict:
                call(_check_names, type(self._model).__name__, *faults, self._names.prefix)
        except BaseException as error:
            failures = backup.restore()
            if failures and hasattr(error, "add_note"):  # Python 3.11
                error.add_note("The module could not be restored entirely: " + "; ".join(map(str, failures)))
            raise
        return missing, faults[1]


class _Backup:
    """A backup of a module: which objects its tensors are, its extra state and, if asked for, the tensors' values."""

    def __init__(self, model: nn.Module, with_values: bool) -> None:
        self._tables = [
            (table, dict(table)) for module in model.modules() for table in (module._parameters, module._buffers)
        ]
        tensors = {id(value): value for _, values in self._tables for value in values.values() if value is not None}
        copied = [tensor for tensor in tensors.values() if with_values and not is_lazy(tensor)]
        try:
            with DisableTorchFunction():
                self._values = [(tensor, _copied(tensor)) for tensor in copied]
        except (MemoryError, RuntimeError) as error:
            nbytes = sum(tensor.nbytes for tensor in copied)
            raise MemoryError(
                f"Cannot back up the {nbytes} bytes of {type(model).__name__} ({error}): pass backup=False to load"
                " without a backup"
            ) from error
        self._extra = [
            (module, copy.deepcopy(module.get_extra_state()))
            for module in model.modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]

    def restore(self) -> list[Exception]:
        """Restores the module, and returns the errors of the parts that could not be restored."""
        faults = []
        for table, values in self._tables:
            table.clear()
            table.update(values)
        with torch.no_grad(), DisableTorchFunction():
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
    """Returns a copy, in host memory if the tensor is plain: a device may have no room for two."""
    detached = tensor.detach()
    return detached.to("cpu", copy=True) if is_plain_tensor(detached) else detached.clone()


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Returns whether the bits are equal. A tensor's version does not show it: changes through ``.data`` keep it."""
    try:
        right = right.to(left.device)
        return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))
    except Exception:  # the layout or class has no view of bytes
        return False
