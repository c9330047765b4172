"""How torch.compile meets the package's Python functions: it leaves them alone, and breaks the graph around them.

Owns that mark. The operators themselves can be in a graph; see _fake_kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def dynamo_disable(function: Function) -> Function:
    """``function``, marked as torch.compiler.disable would, without the second that importing torch._dynamo takes."""
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
    """Whether a mode, such as FakeTensorMode, wants to see operators, instead of what they do."""
    return torch._C._len_torch_dispatch_stack() > 0
