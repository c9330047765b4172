"""Builds the wheels with a compiled layer for every supported torch, and the sdist, and checks them.

Run: make wheels    or    out/packaging/bin/python packaging/wheels.py [--torch 2.11 ...] [--machine aarch64]

Compiles the core with cargo and the layers with g++, both for an old C library, so that the wheel installs on every
system that torch's own wheels support. Needs no torch: it downloads the headers of each (7 to 10 MB), and the linker
takes empty libraries with the names of torch's. auditwheel checks the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from downloads import TorchHeaders, install_compilers, sysroot, torch_releases

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "safetensors_torch"
OUT, DOWNLOADS = ROOT / "out" / "dist", ROOT / "out" / "downloads"
PLATFORM = "manylinux_2_28"
MACHINES = ("x86_64", "aarch64")
# Of torch: a process that imports torch has loaded them.
TORCH_LIBRARIES = ("torch_cpu", "c10")
LIMIT_BYTES = 40_000_000


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout.strip()


def native_build() -> ModuleType:
    """Imports the package's _native_build by its path, because the package imports torch."""
    spec = importlib.util.spec_from_file_location("_native_build", PACKAGE / "_native_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The newest versions of the C++ library's symbols that every such system has. torch's wheels keep to them too.
CXX_LIBRARY_VERSIONS = {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
# Rust's standard library calls it if it exists. A reference to glibc's would require glibc 2.30.
GETTID = """
#include <sys/syscall.h>
#include <unistd.h>
pid_t gettid(void) { return (pid_t)syscall(SYS_gettid); }
"""


class Toolchain:
    """g++ for a machine and an old C library and C++ library."""

    def __init__(self, machine: str, directory: Path) -> None:
        self.machine = machine
        prefix = "" if machine == platform.machine() else f"{machine}-linux-gnu-"
        self._compiler, self._directory = f"{prefix}g++", directory
        self.strip = f"{prefix}strip"
        if prefix:
            install_compilers(machine, self._compiler)
        root, triple = sysroot(machine, DOWNLOADS), f"{machine}-linux-gnu"
        # Before this machine's libraries, which g++ looks for outside of the sysroot too.
        first = [f"-{kind}{root / path / triple}" for path in ("usr/lib", "lib") for kind in "BL"]
        self._sysroot = [f"--sysroot={root}", *first]
        # g++ looks for its own headers in the sysroot too.
        include = Path("/usr/include" if not prefix else f"/usr/{triple}/include")
        major = output(self._compiler, "-dumpversion").split(".")[0]
        headers = [include / "c++" / major, include / triple / "c++" / major, include / "c++" / major / triple]
        self._headers = [flag for path in headers if path.exists() for flag in ("-isystem", str(path))]
        for name in TORCH_LIBRARIES:
            self._make_stub(f"lib{name}.so", "")
        library = output(self._compiler, "-print-file-name=libstdc++.so")
        self._make_stub("libstdc++.so.6", *old_symbols(output(f"{prefix}objdump", "-T", library)))
        (directory / "gettid.c").write_text(GETTID)
        run(self._compiler, "-x", "c", "-O2", "-fPIC", "-c", directory / "gettid.c", "-o", directory / "gettid.o")
        self.linker = directory / "linker"
        # cargo links its build scripts with it too, for this machine.
        self.linker.write_text(
            "#!/bin/sh\n"
            f'case " $* " in *" -shared "*) ;; *) exec g++ "$@" ;; esac\n'
            f'exec {self._compiler} {" ".join(self._sysroot)} "$@" {directory / "gettid.o"}\n'
        )
        self.linker.chmod(0o755)

    def _make_stub(self, name: str, assembly: str, versions: str = "") -> None:
        """Makes a library of this name that defines symbols, for the linker alone."""
        source, script = self._directory / "stub.s", self._directory / "stub.map"
        source.write_text(assembly)
        script.write_text(versions or "{ global: *; };\n")
        options = ("-shared", "-nostdlib", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}")
        run(self._compiler, *options, "-o", self._directory / name, source)

    def compile(self, source: str, target: Path, *flags: str) -> None:
        run(self._compiler, *self._sysroot, "-nostdinc++", *self._headers, "-fPIC", *flags, "-c", source, "-o", target)

    def link(self, target: Path, *arguments: str) -> None:
        # The layer needs torch's libraries, although the empty ones define none of its symbols.
        needed = ["-Wl,--no-as-needed", f"-L{self._directory}", *(f"-l{name}" for name in TORCH_LIBRARIES)]
        # What the old C++ library lacks comes from the static one, and stays hidden.
        standard = [self._directory / "libstdc++.so.6", "-l:libstdc++.a"]
        run(self.linker, "-shared", "-o", target, *arguments, *needed, *standard)


def old_symbols(table: str) -> tuple[str, str]:
    """Returns assembly that defines the old symbols in a table of objdump, and a linker script with their versions."""
    assembly, versions = [], {}
    for line in table.splitlines():
        found = re.search(r" (D[FO]) +(\.\w+)\s+\w+ +((GLIBCXX|CXXABI)_([\d.]+)) +(\S+)$", line)
        if found is None:
            continue
        kind, _, version, family, number, name = found.groups()
        if tuple(map(int, number.split("."))) <= CXX_LIBRARY_VERSIONS[family]:
            assembly.append(f".globl {name}\n.type {name}, @{'function' if kind == 'DF' else 'object'}\n{name}:")
            versions.setdefault(version, []).append(name)
    script = [f"{version} {{ global: {'; '.join(names)}; }};" for version, names in versions.items()]
    return ".data\n" + "\n".join(assembly) + "\n.byte 0\n", "\n".join(script) + "\n"


def build_layer(build: ModuleType, tools: Toolchain, native: Path, torch: TorchHeaders, cxx11_abi: bool) -> Path:
    """Compiles the layer for a release of torch with a C++ ABI into ``native``, and returns it."""
    includes = [f"-I{path}" for path in build.include_dirs(native)]
    for path in (torch.include, torch.include / "torch" / "csrc" / "api" / "include"):
        includes += ["-isystem", str(path)]
    # No paths of this machine.
    private = [f"-ffile-prefix-map={native}=native", f"-ffile-prefix-map={torch.include.parent}=torch"]
    flags = [f"-std={torch.standard}", f"-D_GLIBCXX_USE_CXX11_ABI={int(cxx11_abi)}", *build.COMPILE_FLAGS]
    with tempfile.TemporaryDirectory() as directory:
        objects = []
        for source in build.sources(native):
            objects.append(Path(directory) / f"{Path(source).name}.o")
            tools.compile(source, objects[-1], *flags, *private, *includes)
        library = native / "lib" / build.minor_library_name(torch.version, cxx11_abi)
        tools.link(library, *map(str, objects), *build.link_flags(native, library.name), "-Wl,--strip-debug")
    return library


def build_core(tools: Toolchain, directory: Path) -> Path:
    """Builds the wheel without layers, and returns its unpacked directory."""
    target = f"{tools.machine}-unknown-linux-gnu"
    environment = {
        **os.environ,
        "SAFETENSORS_TORCH_AOT": "0",
        "CARGO_BUILD_TARGET": target,
        f"CARGO_TARGET_{target.upper().replace('-', '_')}_LINKER": str(tools.linker),
        "STRIP": tools.strip,
        # What Python takes for its own platform, which is part of the wheel's name.
        "_PYTHON_HOST_PLATFORM": f"linux-{tools.machine}",
    }
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-build-isolation")
    run(*pip, "--no-deps", "--wheel-dir", directory / "core", ROOT, env=environment)
    (wheel,) = (directory / "core").glob("*.whl")
    run(sys.executable, "-m", "wheel", "unpack", "--dest", directory / "unpacked", wheel)
    (unpacked,) = (directory / "unpacked").iterdir()
    (licenses,) = unpacked.glob("*.dist-info/licenses")
    crates = output(sys.executable, ROOT / "packaging" / "licenses.py", "--features=bridge")
    (licenses / "crates").write_text(crates + "\n", encoding="utf-8")
    return unpacked


def pack(unpacked: Path, machine: str, directory: Path) -> Path:
    """Packs the wheel, makes sure that every system of PLATFORM can load its libraries, and returns its path in OUT."""
    directory.mkdir()
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", directory, unpacked)
    (packed,) = directory.glob("*.whl")
    exclude = [f"--exclude=lib{name}.so" for name in TORCH_LIBRARIES]
    # auto: auditwheel accepts the name of a platform only for the machine that it runs on.
    repair = (sys.executable, "-m", "auditwheel", "repair", *exclude, "--plat", "auto", "--only-plat")
    run(*repair, "--wheel-dir", OUT, packed)
    (wheel,) = OUT.glob(f"*_{machine}.whl")
    if f"-{PLATFORM}_{machine}." not in wheel.name:
        raise SystemExit(f"{wheel.name} must be for {PLATFORM}")
    size = wheel.stat().st_size
    if size > LIMIT_BYTES:
        raise SystemExit(f"{wheel.name} has {size:,} bytes, more than {LIMIT_BYTES:,}")
    return wheel


def build_wheel(build: ModuleType, machine: str, releases: dict[str, str], directory: Path) -> Path:
    tools = Toolchain(machine, directory)
    unpacked = build_core(tools, directory)
    native = unpacked / "safetensors_torch" / "native"
    torches = [TorchHeaders(release, machine, DOWNLOADS) for release in releases.values()]
    # The wheels of torch 2.6 have the older C++ ABI on the package index, and the newer one elsewhere.
    layers = [(torch, abi) for torch in torches for abi in sorted({torch.cxx11_abi, True})]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for layer in pool.map(lambda layer: build_layer(build, tools, native, *layer), layers):
            print(f"{layer.name}: {layer.stat().st_size:,} bytes", flush=True)
    return pack(unpacked, machine, directory / "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", metavar="MINOR", help="only these, such as 2.11")
    parser.add_argument("--machine", action="append", choices=MACHINES, help="only these")
    arguments = parser.parse_args()
    build = native_build()
    releases = torch_releases(build.OLDEST_TORCH)
    releases = {minor: releases[minor] for minor in arguments.torch or releases}
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for machine in arguments.machine or MACHINES:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            wheel = build_wheel(build, machine, releases, Path(directory))
        run(sys.executable, "-m", "auditwheel", "show", wheel)
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size:,} bytes, in {time.monotonic() - begin:.0f} s")
    run(sys.executable, "-m", "build", "--quiet", "--no-isolation", "--sdist", "--outdir", OUT, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *OUT.iterdir())


if __name__ == "__main__":
    main()
