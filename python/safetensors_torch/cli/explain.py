"""Explains how loads would read files or checkpoints now: the filesystem, how much is in the page cache, and how many
threads would read with which requests, for a mapped load, one into memory and one to a device. No data is read.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from .._headers import LOAD_TARGETS, FilePlans, explain_loads
from .listing import check_local, remedies, size_text
from .terminal import printable

HELP = "explain how a file would be read"
EXAMPLES = """examples:
  safetensors-torch explain model.safetensors
  safetensors-torch explain checkpoint/
  safetensors-torch explain checkpoint/model.safetensors.index.json --json
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", nargs="+", help="a file, an index (.json), or a directory with either")


def run(options: argparse.Namespace) -> int:
    files: list[FilePlans] = []
    for path in options.path:
        check_local(path)
        with remedies(path):
            files += explain_loads(path)
    if options.json:
        print(json.dumps([_as_json(file) for file in files], indent=2))
        return 0
    for file in files:
        cached = "unknown" if file.cached is None else f"{size_text(min(file.cached, file.nbytes))} in the page cache"
        print(f"{printable(file.path)}  {size_text(file.nbytes)}, {file.filesystem}, {cached}")
        for target, plan in zip(LOAD_TARGETS, file.plans, strict=True):
            readers = f"{plan.readers} reader{'s'[: plan.readers != 1]}"
            request = f", {size_text(plan.request)} a read" if plan.request else ""
            print(f"  {target:7} {readers}{request}{', direct' * plan.direct}: {plan.reason}")
    return 0


def _as_json(file: FilePlans) -> dict[str, Any]:
    plans = {target: plan._asdict() for target, plan in zip(LOAD_TARGETS, file.plans, strict=True)}
    return {**file._asdict(), "plans": plans}
