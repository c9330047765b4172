"""How the libtorch layer is compiled, and the names of its libraries. Imports no torch.

setup.py and packaging/wheels.py compile layers ahead of time, ``_native_library.py`` at the first import.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OLDEST_TORCH = (2, 6)
# No -std: torch.utils.cpp_extension passes the standard that torch's headers need. No warnings: make lint has them.
COMPILE_FLAGS = ["-O2", "-w", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]


def library_name(torch_version: str, cxx11_abi: bool) -> str:
    """Returns the file name of the layer for exactly one version of torch, such as 2.11.0+cu130, and its C++ ABI."""
    return f"libsafetensors_torch-torch{torch_version}-{'cxx11' if cxx11_abi else 'precxx11'}.so"


def minor_library_name(torch_version: str, cxx11_abi: bool) -> str | None:
    """Returns the file name of the layer for every release of a minor version, such as 2.11; None for a pre-release.

    The builds of a release for CPU, CUDA and ROCm share what the layer uses: docs/packaging.md.
    """
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", torch_version)
    return library_name(release[1], cxx11_abi) if release else None


def layer_versions(directory: Path, cxx11_abi: bool) -> list[str]:
    """Returns the versions of torch that a directory has layers for, in ascending order."""
    before, after = library_name("*", cxx11_abi).split("*")
    versions = [path.name.removeprefix(before).removesuffix(after) for path in directory.glob(f"{before}*{after}")]
    return sorted(versions, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])


def sources(native: Path) -> list[str]:
    """Returns the C++ files to compile."""
    return [str(path) for pattern in ("cpp/layer.cpp", "bridge/*.cc") for path in sorted(native.glob(pattern))]


def include_dirs(native: Path) -> list[str]:
    """Returns the include directories of the sources and of the generated bridge."""
    return [str(native), str(native / "bridge" / "include"), str(native / "include")]


def core_link_flags(native: Path) -> list[str]:
    """Returns the linker's inputs and options for a library that contains a copy of the core.

    The library is never unloaded, because threads may run its code.
    """
    (archive,) = native.glob("lib/*.a")
    return [str(archive), "-Wl,-z,nodelete", "-lpthread", "-ldl", "-lm"]


def link_flags(native: Path, name: str) -> list[str]:
    """Returns the linker's inputs and options for the layer with the file name ``name``.

    It exports the functions of the C header, for C++ programs that link it, and nothing else: torch finds its operators
    by name.
    """
    header = (native / "include" / "safetensors_torch.h").read_text(encoding="utf-8")
    functions = re.findall(r"^(?!static |typedef )[a-z].*?[ *](sft_\w+)\(", header, re.MULTILINE)
    return [
        # Nothing in the layer calls them; -u makes the linker take them from the core.
        *(f"-Wl,-u,{function}" for function in functions),
        f"-Wl,--version-script={native / 'lib/cmake/SafetensorsTorch/SafetensorsTorchLayer.map'}",
        f"-Wl,-soname,{name}",
        "-Wl,--gc-sections",
        "-Wl,--as-needed",
        *core_link_flags(native),
    ]


@contextmanager
def ninja_on_path() -> Iterator[None]:
    """Adds the ninja of the Python package to PATH, which lacks it if the environment is not activated."""
    before = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        try:
            import ninja
        except ImportError:
            pass
        else:
            os.environ["PATH"] = os.pathsep.join(filter(None, [before, ninja.BIN_DIR]))
    try:
        yield
    finally:
        os.environ["PATH"] = before
