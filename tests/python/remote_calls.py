"""The functions that read a file by its URL, for tests that run each of them.

A call takes the URL or the local path of a file with TENSORS, and returns the tensors that it read. What it returns for
the path is right for the URL too.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import safetensors_torch
from proc import eventually
from safetensors_torch import _remote
from safetensors_torch.distributed import HuggingFaceStorageReader, load_into, weights_iterator

Tensors = dict[str, torch.Tensor]

# 10 MB, which are two requests at least.
TENSORS: Tensors = {
    "large": torch.arange(2_500_000, dtype=torch.float32).view(4, 625_000),
    "matrix": torch.arange(24.0).view(4, 6).half(),
    "empty": torch.zeros(0, 3),
}


def _opened(work: Callable[[Any], Tensors]) -> Callable[[str], Tensors]:
    def call(url: str) -> Tensors:
        with safetensors_torch.safe_open(url, framework="pt") as file:
            return work(file)

    return call


def _loaded(**options: Any) -> Callable[[str], Tensors]:
    def call(url: str) -> Tensors:
        model = torch.nn.Module()
        for name, tensor in TENSORS.items():
            model.register_buffer(name, torch.zeros_like(tensor))
        safetensors_torch.load_model(model, url, **options)
        return dict(model.state_dict())

    return call


def _load_into(url: str) -> Tensors:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load_into(tensors, url)
    return tensors


def own_error(work: Callable[[], Any]) -> Any:
    """Calls a function of torch.distributed.checkpoint, and raises the error of this process, which that wraps."""
    try:
        return work()
    except CheckpointException as error:
        failure, _ = error.failures[0]
    try:
        raise failure
    finally:
        del failure  # the frame is in its traceback


def _storage_reader(url: str) -> Tensors:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    own_error(lambda: dcp.load(tensors, storage_reader=HuggingFaceStorageReader(url), no_dist=True))
    return tensors


CALLS: dict[str, Callable[[str], Tensors]] = {
    "load_file": safetensors_torch.load_file,
    "load_sharded": safetensors_torch.load_sharded,
    "load_model": _loaded(),
    "load_model assign": _loaded(assign=True),
    "get_tensor": _opened(lambda file: {"large": file.get_tensor("large")}),
    "get_slice": _opened(lambda file: {"large": file.get_slice("large")[1:]}),
    "prefetch": _opened(lambda file: dict(file.prefetch())),
    "iterate": lambda url: dict(safetensors_torch.iterate([url])),
    "load_into": _load_into,
    "storage reader": _storage_reader,
    "weights_iterator": lambda url: dict(weights_iterator([url])),
}


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def outcome(call: Callable[[str], Tensors], url: str) -> tuple[Tensors | type[Exception], str]:
    """Returns the tensors, or the class of the error and all that is shown of it, and keeps nothing of its frames."""
    try:
        return call(url), ""
    except Exception as error:
        return type(error), "".join(traceback.format_exception(error))


def check_nothing_is_open() -> None:
    """Checks that no file is open, and that no thread of the library still runs."""
    # Without a collection of cycles, which a user may wait long for.
    is_closed = eventually(lambda: _remote._open == {}, 1)
    is_idle = eventually(lambda: _threads() == [], 2)
    if not is_closed:
        gc.collect()  # for the next test
    assert is_closed, "clients of closed files"
    assert is_idle, _threads()


def _threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:
            continue  # it has ended
    return [name for name in names if name.startswith(("safetensors", "sft-"))]
