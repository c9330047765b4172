"""A process that runs one work of one subject, once for each line of stdin.

Owns the calls and their clock. The parent process owns the order, the files, the page cache and the memory figures.

Run: python worker.py JSON    where JSON is the plan of bench.py. Answers in lines of JSON:
    {"ready": VERSION}        when the input of the work is in memory
    {"missing": TEXT}         instead, if the library is not installed or lacks the function; the process ends
    line "run"                one run:  {"seconds": S, "first": S or null}, the latter of the first of several tensors
    line "check"              the same, then compares the result with the data set
    line "hold"               answers {"about": "to run"}, runs at the next line, and keeps the result until the line
                              after that
    {"error": TRACEBACK}      if a run fails; the process ends
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data
import libraries
import works


def model_of(shapes: dict[str, tuple[int, ...]]) -> Any:
    """Returns a module with these parameters, its memory touched."""
    import torch

    root = torch.nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(torch.ones(shape), requires_grad=False))
    return root


def touched(tensors: dict, every_page: bool) -> dict:
    """Returns the tensors, after reading a byte of each of their pages if requested."""
    if every_page:
        import torch

        for tensor in tensors.values():
            tensor.view(-1).view(torch.uint8)[::4096].sum().item()
    return tensors


def synchronize(path: str) -> None:
    """Waits until a file and its directory are on the disk."""
    for name in (path, os.path.dirname(path)):
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def wait_for_threads() -> None:
    """Waits until no other thread of this process runs: a call may return before its threads end."""
    deadline = time.monotonic() + 60
    quiet = 0
    while quiet < 2:
        states = []
        for task in os.listdir("/proc/self/task"):
            if int(task) != threading.get_native_id():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                    states.append(Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()[0])
        quiet = quiet + 1 if all(state in "SZX" for state in states) else 0
        if time.monotonic() > deadline:
            raise TimeoutError(f"threads are still at work a minute after the call: {states}")
        time.sleep(0.002)


class Task:
    """The work of this process: its input, the timed call, and the expected result."""

    def __init__(self, plan: dict) -> None:
        functions, self.version = libraries.find(plan["library"], plan["version"], plan["path"], not plan["cold"])
        if not hasattr(functions, plan["call"]):
            raise libraries.Missing(f"{plan['library']} {self.version} has no function {plan['call']}")
        self._plan = plan
        self._source = Path(plan["source"])  # the file that the subject reads
        self._neutral = Path(plan["neutral"])  # the .safetensors with the expected values
        self._model: Any = None
        self._names: list[str] = []
        self.keeps = False  # whether an iteration keeps its tensors
        self.first_seconds: float | None = None  # until the first tensor of an iteration
        options = dict(plan["options"])
        if plan["durable"] and plan["library"] == "ours":
            options["durable"] = True
        self.call = self._bind(getattr(functions, plan["call"]), options)

    def _bind(self, function: Callable, options: dict) -> Callable[[], Any]:
        plan, source, target = self._plan, str(self._source), self._plan["target"]
        if plan["call"] == "load_file":
            return lambda: touched(function(source, **options), plan["touch"])
        if plan["call"] in works.ITERATIONS:
            return lambda: self._iterate(function(source, **options))
        if plan["call"] == "load":
            contents = self._source.read_bytes()
            given = bytearray(contents) if plan["mutable"] else contents
            return lambda: function(given, **options)
        if plan["call"] == "load_model":
            self._model = model_of(data.DATA_SETS[plan["data"]].shapes())
            return lambda: function(self._model, source, **options)
        if plan["call"] == "dict":  # the minimum of every load
            values = [object() for _ in data.DATA_SETS[plan["data"]].shapes()]
            return lambda: dict(zip(self._names, values, strict=True))
        tensors = data.read_tensors(self._neutral)
        if plan["call"] == "save":
            return lambda: function(tensors, **options)
        if plan["durable"] and plan["library"] != "ours":
            return lambda: (function(tensors, target, **options), synchronize(target))
        return lambda: function(tensors, target, **options)

    def _iterate(self, tensors: Iterator[tuple[str, Any]]) -> dict:
        start = time.perf_counter()
        self.first_seconds = None
        kept = {}
        for name, tensor in tensors:
            touched({name: tensor}, self._plan["touch"])
            if self.first_seconds is None:
                self.first_seconds = time.perf_counter() - start
            if self.keeps:
                kept[name] = tensor
        return kept

    def prepare(self) -> None:
        """Brings the process into the same state before each run."""
        if self._model is not None:
            for parameter in self._model.parameters():
                parameter.zero_()
        if self._plan["call"] == "dict":  # names whose hash is not known yet
            self._names = [name.encode().decode() for name in data.DATA_SETS[self._plan["data"]].shapes()]
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier runs freed would be warm

    def check(self, result: Any) -> None:
        """Compares the names, and the contents of some tensors, with the data set."""
        if self._plan["call"] == "dict":
            if list(result) != self._names:
                raise ValueError("the dict has not the names that it was made of")
            return
        import torch

        header, _ = data.read_header(self._neutral)
        names = list(header)
        some = data.read_tensors(self._neutral, {names[0], names[len(names) // 2], names[-1]})
        found = self._found(result)
        if set(found) != set(names):
            raise ValueError(f"{len(found)} tensors came out, not the {len(names)} of the data set")
        for name, tensor in some.items():
            if self._plan["call"] == "halves":
                tensor = tensor[: len(tensor) // 2]
            if not torch.equal(found[name], tensor):
                raise ValueError(f"tensor {name} is not as in the data set")

    def _found(self, result: Any) -> dict:
        import torch

        call, target = self._plan["call"], self._plan["target"]
        if call == "load_model":
            return self._model.state_dict()
        if call == "save":
            with io.BytesIO(result) as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            view = torch.frombuffer(bytearray(memoryview(result)[8 + length :]), dtype=torch.uint8)
            dtype = getattr(torch, data.DATA_SETS[self._plan["data"]].dtype)
            return {
                name: view[slice(*entry["data_offsets"])].view(dtype).view(entry["shape"])
                for name, entry in header.items()
            }
        if call == "save_sharded":
            return dict(pair for path in Path(target).glob("*.safetensors") for pair in data.read_tensors(path).items())
        if call == "save_file":
            return torch.load(target) if self._plan["library"] == "torch" else data.read_tensors(Path(target))
        return result


def serve(task: Task, requests: io.TextIOBase, answer: Callable[[dict], None]) -> None:
    """Runs the requests, one a line, until they end."""
    while line := requests.readline():
        request = line.strip()
        task.prepare()
        task.keeps = request == "check"
        if request == "hold":
            answer({"about": "to run"})
            requests.readline()
        start = time.perf_counter()
        result = task.call()
        seconds = time.perf_counter() - start
        if request == "check":
            task.check(result)
        if request == "hold":
            answer({"held": True})
            requests.readline()
        del result
        # Before the answer, so that no work remains while another process runs.
        gc.collect()
        wait_for_threads()
        answer({"seconds": seconds, "first": task.first_seconds})


def main() -> None:
    # The answers have their own descriptor; output of libraries goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        task = Task(json.loads(sys.argv[1]))
        answer({"ready": task.version})
        serve(task, sys.stdin, answer)
    except libraries.Missing as missing:
        answer({"missing": str(missing)})
    except Exception:
        answer({"error": traceback.format_exc()})
        sys.exit(1)


if __name__ == "__main__":
    main()
