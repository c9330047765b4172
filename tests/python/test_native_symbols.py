"""The libraries in the package: what they need, what they export, and that they contain no path of the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from safetensors_torch import _native_library

NATIVE = _native_library.NATIVE
SHIPPED = NATIVE / "lib" / _native_library.library_name()
ALLOWED = re.compile(r"lib(c10|torch_cpu|torch)\.so|lib(stdc\+\+|gcc_s|c|m|dl|pthread)\.so\.\d|ld-linux[\w-]*\.so\.\d")


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def expect_portable(library: Path) -> None:
    """Checks that a layer needs torch alone, is never unloaded, and exports the functions of the C header alone.

    A C++ program links it. The process may also load another build of the same code, or another Rust library.
    """
    dynamic = tool("readelf", "--wide", "--dynamic", str(library))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libc10.so", "libtorch_cpu.so"} <= set(needed)
    assert [name for name in needed if not ALLOWED.fullmatch(name)] == []
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic) == []
    assert re.search(r"\(FLAGS_1\).*NODELETE", dynamic), "a dlclose would unload it"
    undefined = tool("nm", "--dynamic", "--undefined-only", str(library)).split()
    assert [name for name in undefined if re.match(r"_?Py[A-Z_]", name)] == []
    header = (NATIVE / "include" / "safetensors_torch.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"\b(sft_\w+)\(", re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)))
    symbols = tool("nm", "--dynamic", "--defined-only", str(library)).splitlines()
    assert {line.split()[-1] for line in symbols} == declared
    # Its own calls do not go through the dynamic linker, which could choose another library's function.
    assert "sft_" not in tool("readelf", "--wide", "--relocs", str(library))
    assert f"[{library.name}]" in dynamic, "SONAME"


@pytest.mark.skipif(not SHIPPED.exists(), reason="installed without an ahead-of-time library")
def test_the_shipped_library_is_portable() -> None:
    expect_portable(SHIPPED)


def test_no_path_of_the_build_is_shipped() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in NATIVE.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert os.fsencode(root) not in content, path
            assert os.fsencode(Path.home() / ".cargo") not in content, path
