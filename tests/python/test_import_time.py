"""The import of the package after torch: it takes little time, and imports no module that it does not need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import safetensors_torch
from safetensors_torch import _native_cache, _native_library

PACKAGE = Path(safetensors_torch.__file__).parent
SHIPPED = PACKAGE / "native" / "lib" / _native_library.library_name()
pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not SHIPPED.exists(), reason="installed without an ahead-of-time library"),
]
# Milliseconds. It takes about 10.
LIMIT = 50
TRIES = 8

# Processor time, because other processes may run on this machine.
IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import safetensors_torch
took = time.process_time() - start
print(json.dumps({"took": 1000 * took, "modules": sorted(set(sys.modules) - before)}))
"""


def imported(environment: dict[str, str]) -> dict:
    # A compilation would fail.
    changed = {**os.environ, _native_library.CACHE_VARIABLE: "/proc/none", **environment}
    result = subprocess.run([sys.executable, "-c", IMPORT], env=changed, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.fixture(params=["shipped", "cached"])
def environment(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A package built for this torch, and one with a cached layer."""
    if request.param == "shipped":
        return {}
    site, cache = tmp_path / "site", tmp_path / "cache"
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setenv(_native_library.CACHE_VARIABLE, str(cache))
    layer = _native_cache.library()
    layer.parent.mkdir(parents=True, mode=0o700)
    shutil.copy(SHIPPED, layer)
    return {"PYTHONPATH": str(site), _native_library.CACHE_VARIABLE: str(cache)}


def test_import_is_quick(environment: dict[str, str]) -> None:
    times = []
    while not times or (min(times) >= LIMIT and len(times) < TRIES):
        times.append(imported(environment)["took"])
    assert min(times) < LIMIT, times


def test_import_imports_only_the_package() -> None:
    """It imports no optional package, and no part of torch that torch imports lazily."""
    modules = {name for name in imported({})["modules"] if name.partition(".")[0] != "safetensors_torch"}
    assert modules <= set(sys.stdlib_module_names), modules
