"""Dealings with torch.compile and with dispatch modes.

Owns the mark that makes torch.compile break its graph around the package's functions. Operators may be in a graph: see
_fake_kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def dynamo_disable(function: Function) -> Function:
    """Marks ``function`` as torch.compiler.disable would, without importing torch._dynamo, which takes a second."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "it works on files and memory outside of any graph"  # type: ignore[attr-defined]
    native = torch._C._dynamo.eval_frame
    if hasattr(native, "set_code_exec_strategy"):  # torch 2.7
        skip = native._FrameAction.SKIP
        native.set_code_exec_strategy(function.__code__, native._FrameExecStrategy(skip, skip))
    elif hasattr(native, "skip_code"):
        native.skip_code(function.__code__)
    return function


def is_traced() -> bool:
    """Returns whether a dispatch mode is active, such as FakeTensorMode, which must see operators."""
    return torch._C._len_torch_dispatch_stack() > 0
