"""Runs the checks of loads and saves with a device, each in its own process.

Owns their order, and the result of one that fails, hangs or crashes. checking.py defines a check.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import checking
import devices
import processes

_MODULES = ("checks_data", "checks_streams", "checks_limits", "checks_tools")
_SECONDS = 600.0


def collect() -> list[checking.Check]:
    """Returns all checks, in order."""
    for name in _MODULES:
        importlib.import_module(name)
    return checking.CHECKS


def run_all(device: str, directory: Path, only: str) -> list[dict[str, Any]]:
    """Runs every check whose name matches ``only``, prints a line for each, and returns the results."""
    results = []
    for one in (one for one in collect() if re.search(only, one.name)):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="check-", dir=directory) as own:
            try:
                found = processes.ask("checks.py", {"name": one.name, "device": device, "directory": own}, _SECONDS)
                if "ended" in found:
                    found = {"result": "FAILED", "why": f"all was right, but then {found['ended']}"}
            except processes.ChildError as error:
                found = {"result": "FAILED", "why": str(error)}
        found.update(name=one.name, seconds=round(time.monotonic() - start, 1))
        results.append(found)
        why = f": {found['why']}" if found.get("why") else ""
        print(f"{found['result']:<8}{one.name}{why}", file=sys.stderr, flush=True)
    return results


def _work(request: dict[str, Any]) -> dict[str, Any]:
    # Before the library: a simulated device must exist when it is imported.
    device = devices.open_device(request["device"])
    one = next(one for one in collect() if one.name == request["name"])
    import safetensors_torch

    # Overrides the environment.
    safetensors_torch.set_transfer_options(pinned_pool_bytes=checking.POOL, threads=0)
    try:
        figures = one.work(checking.Setting(device, Path(request["directory"])))
        device.synchronize()
    except checking.Skip as skip:
        return {"result": "skipped", "why": str(skip)}
    return {"result": "ok", "figures": figures or {}}


if __name__ == "__main__":
    processes.answer(_work)
