"""Fake kernels of the operators, for torch.compile, torch.export and FakeTensorMode.

Owns the registrations with torch.library, and the differences between versions of torch there. The shapes come from
the native library, which reads the header of the file.

``load`` and its variants cannot have one: the number and shapes of their tensors are in the bytes, which a fake tensor
lacks. Their kernels say so, and a compiler then runs the real operator outside of its graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ._errors import call

_NAMESPACE = "safetensors_torch"


def _open(filename: str):
    # With this backend only the header is read, and nothing is mapped.
    return call(torch.classes.safetensors_torch.File, os.fsencode(filename), "pread")


def _like(file, name: str, device: torch.device) -> torch.Tensor:
    with _disable_current_modes():
        real = call(file.get_tensor, name, torch.device("meta"))
    # Outside of the block, so that the active mode makes it a tensor of its own kind.
    return torch.empty(real.shape, dtype=real.dtype, device=device)


def _get_tensor(filename: str, name: str, *, device: torch.device = torch.device("cpu")) -> torch.Tensor:  # noqa: B008
    return _like(_open(filename), name, device)


def _get_slice(
    filename: str,
    name: str,
    starts: list[int],
    stops: list[int],
    steps: list[int] | None = None,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> torch.Tensor:
    with _disable_current_modes():
        steps = [1] * len(starts) if steps is None else steps
        real = call(_open(filename).get_slice, name, starts, stops, steps, torch.device("meta"))
    return torch.empty(real.shape, dtype=real.dtype, device=device)


def _load_tensors(
    filename: str,
    names: list[str],
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    backend: str = "mmap",
) -> list[torch.Tensor]:
    file = _open(filename)
    return [_like(file, name, device) for name in names]


def _load_file(
    filename: str,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    backend: str = "mmap",
    prefault: bool | None = None,
    dtype: torch.dtype | None = None,
    names: list[str] | None = None,
) -> dict[str, torch.Tensor]:
    file = _open(filename)
    tensors = {}
    for name in call(file.offset_keys):
        if names is None or name in names:
            tensor = _like(file, name, device)
            convert = dtype is not None and tensor.dtype.is_floating_point
            tensors[name] = tensor.to(dtype) if convert else tensor
    for name in names or ():
        call(file.dtype, name)  # raises if there is no such name
    return tensors


def _load_file_lists(
    filename: str, *, device: torch.device, backend: str, prefault: bool | None
) -> tuple[list[str], list[torch.Tensor]]:
    tensors = _load_file(filename, device=device)
    return list(tensors), list(tensors.values())


def _depends_on_data(op: torch._ops.OpOverload) -> Callable[..., NoReturn]:
    def kernel(data: torch.Tensor, **options: object) -> NoReturn:
        from torch._subclasses.fake_tensor import DataDependentOutputException

        raise DataDependentOutputException(op)

    return kernel


def _save(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> torch.Tensor:
    # The size depends on names and shapes in a way that only the native library knows. A tracer gets a new symbol.
    size = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _save_file(
    tensors: dict[str, torch.Tensor],
    filename: str,
    metadata: dict[str, str] | None = None,
    *,
    durable: bool = False,
) -> None:
    return None


def _save_tensors(
    filename: str,
    names: list[str],
    tensors: list[torch.Tensor],
    metadata: dict[str, str] | None = None,
    *,
    durable: bool = False,
) -> None:
    if any(type(tensor) is torch.Tensor and tensor.is_meta for tensor in tensors):
        # Not a tracer: torch calls this kernel for tensors on the meta device too, which the real one refuses.
        call(torch.ops.safetensors_torch._check_save, dict(zip(names, tensors, strict=True)))


def _keep_in_graphs(op: torch._ops.OpOverload) -> None:
    """Marks an operator as having side effects, so that no compiler drops or reorders its calls."""
    torch.fx.node.has_side_effect(op)
    try:
        from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

        _register_effectful_op(op, _EffectType.ORDERED)
    except (ImportError, AttributeError, TypeError):
        # These are private to torch and may change. The mark above still keeps the call in a graph of torch.fx.
        return


def register() -> None:
    """Registers the fake kernels and effects with torch, after the operators.

    torch accepts one kernel for each operator and process, but the package may be imported again (after its removal
    from sys.modules, or after an interrupted import). So torch gets functions that call the latest kernels.
    """
    ops = torch.ops.safetensors_torch
    kernels: dict[str, Callable[..., object]] = vars(ops).setdefault("_fake_kernels", {})
    for name, kernel in (
        ("load", _depends_on_data(ops.load.default)),
        ("_load_lists", _depends_on_data(ops._load_lists.default)),
        ("_load_shared_lists", _depends_on_data(ops._load_shared_lists.default)),
        ("get_slice", _get_slice),
        ("get_tensor", _get_tensor),
        ("load_file", _load_file),
        ("_load_file_lists", _load_file_lists),
        ("load_tensors", _load_tensors),
        ("save", _save),
        ("save_file", _save_file),
        ("save_tensors", _save_tensors),
    ):
        if name not in kernels:
            torch.library.register_fake(f"{_NAMESPACE}::{name}", _latest(kernels, name))
        kernels[name] = kernel
    reads = (ops.get_slice, ops.get_tensor, ops.load_file, ops.load_tensors)
    for op in (*reads, ops.save, ops.save_file, ops.save_tensors):
        _keep_in_graphs(op.default)


def _latest(kernels: dict[str, Callable[..., object]], name: str) -> Callable[..., object]:
    def kernel(*args: object, **kwargs: object) -> object:
        return kernels[name](*args, **kwargs)

    return kernel


register()
