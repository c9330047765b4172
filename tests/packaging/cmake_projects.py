"""A foreign CMake project that fetches the sources of the library, or finds it in the wheel of `make wheels`.

Builds, runs, installs and times tests/install/consumer: with the sdist by FetchContent, with a compiled layer of the
Python package, and with the layer that it compiles from the package. Works in a temporary directory.

Run: python tests/packaging/cmake_projects.py [--torch-of PYTHON] [--wheel FILE]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from commands import ROOT, run
from ways import Environment, expect, make_sdist

PROJECT = ROOT / "tests" / "install" / "consumer"
# Prints the safetensors_torch libraries of a process that has loaded a program's library, then imported the package.
BESIDE_PYTHON = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1])
import safetensors_torch
assert safetensors_torch.load(safetensors_torch.save({"a": torch.ones(3)}))["a"].sum() == 3
print({line.split()[-1] for line in open("/proc/self/maps") if "libsafetensors_torch" in line})
"""


class Project:
    """The project in a build directory of its own."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory, self._environment = directory, environment

    def _run(self, *command: str | Path) -> str:
        return run(*command, environment=self._environment)

    def build(self, *options: str) -> str:
        """Configures and builds the project, runs its programs, and returns what CMake said."""
        begin = time.monotonic()
        configure = ("cmake", "-G", "Ninja", "-S", PROJECT, "-B", self.directory)
        said = self._run(*configure, "-DCMAKE_BUILD_TYPE=Release", *options)
        self._run("cmake", "--build", self.directory)
        print(f"{self.directory.name}: built in {time.monotonic() - begin:.0f} s", flush=True)
        for program in ("use_c", "use_cpp"):
            if (self.directory / program).exists():
                self._run(self.directory / program, self.directory / "file")
        return said

    def library(self, program: Path) -> Path:
        """Returns the library for C++ that the program loads."""
        (path,) = re.findall(r"libsafetensors_torch\S* => (\S+)", self._run("ldd", program))
        return Path(path)

    def install(self) -> None:
        """Installs the C++ program with its library, and runs it."""
        prefix = self.directory / "installed"
        self._run("cmake", "--install", self.directory, "--prefix", prefix)
        program = prefix / "bin" / "use_cpp"
        expect(self.library(program).resolve().parent == prefix / "lib", "  an installed program, beside its library")
        self._run(program, prefix / "file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-of", default=sys.executable, help="a Python that has torch, cmake and ninja")
    parser.add_argument("--wheel", type=Path, help="the wheel of make wheels; default: the one in out/dist")
    arguments = parser.parse_args()
    wheel = arguments.wheel or next((ROOT / "out" / "dist").glob("*manylinux*.whl"), None)
    if wheel is None:
        raise SystemExit("out/dist contains no wheel with compiled layers; run make wheels, or pass --wheel FILE")
    python = os.path.abspath(arguments.torch_of)
    with tempfile.TemporaryDirectory(prefix="safetensors-torch-cmake-") as name:
        directory = Path(name).resolve()
        environment = Environment(python, directory / "environment")
        torch = environment.site / "torch"

        make_sdist(python, directory)
        (archive,) = directory.glob("*.tar.gz")
        fetches = f"-DCONSUMER_FETCHES=file://{archive}"
        fetched_c = Project(directory / "fetched-c", environment.variables)
        fetched_c.build(fetches, "-DCONSUMER_COMPONENTS=c")
        expect("libtorch" not in run("ldd", fetched_c.directory / "use_c"), "a C program with FetchContent")
        fetched = Project(directory / "fetched", environment.variables)
        fetched.build(fetches, f"-DLIBTORCH={torch}")
        expect(
            fetched.library(fetched.directory / "use_cpp").is_relative_to(fetched.directory),
            "a C++ and a C program with FetchContent",
        )
        fetched.install()
        found_before = ("-ULIBTORCH", f"-DCMAKE_PREFIX_PATH={torch}", "-DCONSUMER_FINDS_TORCH=ON")
        said = fetched.build(fetches, *found_before)
        expect("libtorch is" not in said, "  for a torch that the project found before")

        environment.install(wheel.resolve())
        native = Path(environment.check()["native"])
        prefix = f"-DCMAKE_PREFIX_PATH={native}"
        package = Project(directory / "compiled-layer", environment.variables)
        said = package.build(prefix)
        layer = package.library(package.directory / "use_cpp")
        expect(f"using the compiled libtorch layer {layer}" in said, "a C++ and a C program with the wheel's layer")
        mapped = run(environment.python, "-c", BESIDE_PYTHON, layer, environment=environment.variables)
        expect(mapped == f"{{'{layer}'}}\n", "  a process that also imports the package has one copy")
        package.install()
        for path in native.glob("lib/*-torch*.so"):
            path.unlink()
        said = Project(directory / "compiles-layer", environment.variables).build(prefix)
        expect("compiling the libtorch layer" in said, "a C++ and a C program that compile the layer")


if __name__ == "__main__":
    main()
