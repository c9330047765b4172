"""Runs the cases of a module in several processes of one gloo group: one start for all of them.

A case is a function with the decorator `case`. All processes call the cases in their order. An error in one process is
reported for that case; the others go on, or time out, and the next case begins in all.
"""

from __future__ import annotations

import importlib
import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fresh import Process

_HERE = Path(__file__).parent
_PROGRAM = f"""
import sys
sys.path.insert(0, {str(_HERE)!r})
import ranks
ranks.main(*sys.argv[1:])
"""
_TIMEOUT = timedelta(seconds=20)


class World:
    """What a case gets: its process, the groups, and a directory that all processes share."""

    def __init__(self, rank: int, size: int, directory: Path) -> None:
        self.rank = rank
        self.size = size
        self.directory = directory
        # The first two processes.
        self.pair = dist.new_group([0, 1])

    def share(self, value: Any) -> list[Any]:
        """Returns the values of all processes."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


Case = Callable[[World], None]


class Cases(dict[str, Case]):
    """Cases by name, in their order."""

    def __call__(self, function: Case) -> Case:
        if function.__name__ in self:
            raise ValueError(f"two cases have the name {function.__name__}")
        self[function.__name__] = function
        return function


def main(module: str, rank: str, size: str, directory: str) -> None:
    """One process: runs the cases, and prints the error of each that failed as JSON."""
    root = Path(directory)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store", rank=int(rank), world_size=int(size), timeout=_TIMEOUT
    )
    world = World(int(rank), int(size), root)
    errors = {}
    for name, function in importlib.import_module(module).CASES.items():
        world.directory = root / name
        world.directory.mkdir(exist_ok=True)
        try:
            function(world)
        except BaseException:
            errors[name] = traceback.format_exc()
        try:
            dist.barrier()
        except RuntimeError:
            # The group is lost: another process waits in a collective of this case.
            errors.setdefault(name, traceback.format_exc())
            break
    print(json.dumps(errors), flush=True)
    os._exit(0)  # a lost group may not be destroyed


def run(module: str, size: int, directory: Path, timeout: float = 150) -> dict[str, str]:
    """Returns the errors of all processes, by the name of the case."""
    processes = [Process(_PROGRAM, module, rank, size, directory) for rank in range(size)]
    outputs = [process.communicate(timeout) for process in processes]
    errors: dict[str, str] = {}
    for rank, (process, (output, stderr)) in enumerate(zip(processes, outputs, strict=True)):
        found = json.loads(output.splitlines()[-1]) if process.returncode == 0 and output else {"": stderr}
        for name, text in found.items():
            errors[name] = f"{errors.get(name, '')}\nrank {rank}:\n{text}"
    return errors
