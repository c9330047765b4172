"""Builds the Conan packages and their test_package: the C library, and the C++ library for the torch of this Python.

Installs conan from pip's index. What conan does runs without a network if cargo's cache has the crates. Needs CMake.

Run: python tests/packaging/conan_packages.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from commands import run, timed


def main() -> None:
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        raise SystemExit(f"{sys.executable}: has no torch; run a Python that has it")
    (libtorch,) = torch.submodule_search_locations
    with tempfile.TemporaryDirectory(prefix="safetensors-torch-conan-") as name:
        directory = Path(name)
        with timed("pip install conan"):
            run(sys.executable, "-m", "venv", directory / "venv")
            run(directory / "venv/bin/pip", "install", "--quiet", "conan>=2")
        conan = directory / "venv/bin/conan"
        # cmake may be a program of this Python.
        path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "CONAN_HOME": str(directory / "home"), "PATH": path}
        run(conan, "profile", "detect", environment=environment)
        run(conan, "remote", "disable", "*", environment=environment)
        create = (conan, "create", "packaging/conan", "-c", "tools.cmake.cmake_layout:test_folder=$TMP")
        with timed("conan create: C programs with CMake and pkg-config"):
            run(*create, environment=environment)
        with timed("conan create with libtorch: a C++ program too"):
            run(*create, "-o", f"&:libtorch={libtorch}", environment=environment)


if __name__ == "__main__":
    main()
