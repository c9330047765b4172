"""C++ extensions of other projects: the programs of docs/extensions.md, and an extension beside a second library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / "out" / "prefix" / "lib"

pytestmark = pytest.mark.slow


def run(directory: Path, *command: str | Path, **variables: str) -> str:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # ninja
    environment = {**os.environ, "PATH": path, "CFLAGS": "-O0", "PYTHONPATH": str(directory / "site"), **variables}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the guide's programs, where load.py has compiled the extension."""
    directory = tmp_path_factory.mktemp("guide")
    run(ROOT, sys.executable, "tests/readme_block.py", "--programs", "docs/extensions.md", directory)
    printed = run(directory, sys.executable, "load.py", TORCH_EXTENSIONS_DIR=str(directory / "extensions"))
    assert printed == (directory / "load.py.expected").read_text()
    return directory


def exported(library: Path) -> list[str]:
    """Returns the exported names, except those of inline functions."""
    lines = run(library.parent, "nm", "--dynamic", "--defined-only", library).splitlines()
    return [line.split()[2] for line in lines if line.split()[1] not in "vVwWu"]


def test_an_extension_is_compiled_at_load(guide: Path) -> None:
    (library,) = guide.glob("extensions/**/checkpoint*.so")
    names = exported(library)
    assert "PyInit_checkpoint" in names
    assert [name for name in names if name.startswith(("sft_", "rust", "_R", "cxxbridge"))] == []


def test_operators_that_nothing_has_registered_are_reported(guide: Path) -> None:
    (library,) = guide.glob("extensions/**/checkpoint*.so")
    program = """
import sys, torch
sys.modules["safetensors_torch"] = sys  # the extension's import of the package does nothing
import checkpoint
try:
    checkpoint.sum("model.safetensors")
except RuntimeError as error:
    print(error)
"""
    printed = run(guide, sys.executable, "-c", program, PYTHONPATH=str(library.parent))
    assert "a Python extension must import safetensors_torch first" in printed


def test_an_extension_is_installed(guide: Path) -> None:
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", guide / "site", ".")
    run(guide, sys.executable, *install)
    assert run(guide, sys.executable, "use.py") == (guide / "use.py.expected").read_text()


@pytest.mark.skipif(not INSTALLED.exists(), reason="needs what make library installs")
@pytest.mark.parametrize("first", ["safetensors_torch", "checkpoint"])
def test_an_extension_that_links_the_installed_library(first: str, guide: Path, tmp_path: Path) -> None:
    """It loads a second copy of the library, before or after the import of the package."""
    (compiled,) = guide.glob("extensions/**/checkpoint.o")
    link = ("-L", INSTALLED, "-lsafetensors_torch", f"-Wl,-rpath,{INSTALLED}", "-o", tmp_path / "checkpoint.so")
    run(guide, "c++", "-shared", compiled, *link)
    program = f"""
import torch, {first}, safetensors_torch, checkpoint
safetensors_torch.save_file({{"a": torch.ones(3)}}, "file")
assert safetensors_torch.load_file("file")["a"].tolist() == [1.0, 1.0, 1.0]
assert (checkpoint.count("file"), checkpoint.sum("file")) == (1, 3.0)
assert checkpoint.version() == safetensors_torch.__version__
with open("/proc/self/maps") as maps:
    print(len({{line.split()[-1] for line in maps if "libsafetensors_torch" in line}}))
"""
    # The extension's libraries are loaded before it imports the package.
    expected = {"safetensors_torch": "2\n", "checkpoint": "1\n"}[first]
    assert run(tmp_path, sys.executable, "-c", program, PYTHONPATH=str(tmp_path)) == expected


@pytest.mark.skipif(not INSTALLED.exists(), reason="needs what make library installs")
def test_the_installed_library_is_loaded_and_closed_while_its_threads_run(tmp_path: Path) -> None:
    program = f"""
import ctypes, threading, _ctypes
import torch
path = "{INSTALLED}/libsafetensors_torch.so"
library = ctypes.CDLL(path)
ops, done, loads = torch.ops.safetensors_torch, threading.Event(), []
ops.save_file({{"a": torch.ones(1 << 22)}}, "file")
def load():
    while not done.is_set():
        loads.append(ops.load_file("file", backend="pread")["a"].sum().item())
thread = threading.Thread(target=load)
thread.start()
_ctypes.dlclose(library._handle)
for _ in range(200):
    _ctypes.dlclose(_ctypes.dlopen(path, 0))
    ops.load_file("file", prefault=True)  # in background threads
done.set()
thread.join()
assert loads and set(loads) == {{float(1 << 22)}}
"""
    run(tmp_path, sys.executable, "-c", program)
