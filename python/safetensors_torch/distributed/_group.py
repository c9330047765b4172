"""Collectives in which an error of one process becomes an error of all.

Owns the words of those errors. The collectives are those of torch.distributed.checkpoint: no process enters a
collective of data after an error of its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from .._errors import short_repr

_Local = TypeVar("_Local")
_Result = TypeVar("_Result")


class Group:
    """The processes of a group; without an initialized torch.distributed, this process alone.

    Each method takes the name of its step, for errors. All processes of the group must call the same methods in the
    same order. If a function fails in one of them, its error is raised there, and a RuntimeError that names it in the
    others.
    """

    def __init__(self, process_group: Any = None, *, is_alone: bool = False) -> None:
        """Takes the processes of ``process_group``, all processes if it is None, or this one if ``is_alone``."""
        is_group = not is_alone and dist.is_available() and dist.is_initialized()
        self._collectives = _DistWrapper(process_group, is_group, 0)
        if self._collectives.rank < 0:
            raise ValueError(
                "this process is not in process_group; call this function in the processes of the group alone"
            )

    @property
    def process_group(self) -> Any:
        """The group of torch.distributed; None if this process is alone."""
        if self.size < 2:
            return None
        return self._collectives.group or dist.group.WORLD

    @property
    def rank(self) -> int:
        return self._collectives.rank

    @property
    def size(self) -> int:
        return self._collectives.get_world_size()

    def plan(self, step: str, describe: Callable[[], _Local], plan: Callable[[list[_Local]], list[_Result]]) -> _Result:
        """Calls ``describe`` in each process, ``plan`` in the first one with all results; returns the one for this."""
        return self._run(self._collectives.reduce_scatter, step, _sendable(describe), _sendable(plan))

    def each(self, step: str, work: Callable[[], Any]) -> None:
        """Calls ``work`` in each process; returns once all have returned."""
        self._run(self._collectives.all_reduce, step, _sendable(lambda: (work(), None)[1]), lambda _: None)

    def first(self, step: str, work: Callable[[], _Result]) -> _Result:
        """Calls ``work`` in the first process, and returns its result in all."""
        return self._run(self._collectives.broadcast, step, _sendable(work))

    def _run(self, collective: Callable[..., _Result], step: str, *functions: Callable[..., Any]) -> _Result:
        try:
            return collective(step, *functions)
        except CheckpointException as error:
            failures = {rank: failure[0] for rank, failure in error.failures.items()}
        if self.rank in failures:
            raise failures[self.rank]
        others = "; ".join(f"rank {rank}: {type(failure).__name__}: {failure}" for rank, failure in failures.items())
        raise RuntimeError(f"{step} failed in another process, so it was given up in all: {others}")


def _sendable(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Returns the function, with errors that the other processes can receive."""

    def call(*arguments: Any) -> _Result:
        try:
            return function(*arguments)
        except BaseException as error:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:
                raise RuntimeError(f"{type(error).__name__}: {short_repr(str(error))}") from error
            raise

    return call
