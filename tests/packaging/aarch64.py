"""Runs the aarch64 wheel and the tests of the core on another machine, under qemu's user emulation.

The tests of the core are compiled here and run with Debian's C library for aarch64. check.py runs with Debian's Python
and with a torch of the package index that needs no CUDA libraries. Takes 10 minutes or more, so it is not part of the
tests; downloads 250 MB.

Run: make wheels && out/packaging/bin/python tests/packaging/aarch64.py [--torch VERSION] [--no-core]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from commands import ROOT, run

sys.path.insert(0, str(ROOT / "packaging"))
from downloads import debian_packages, install_compilers  # noqa: E402

MACHINE, TARGET = "aarch64", "aarch64-unknown-linux-gnu"
QEMU = "qemu-aarch64-static"
RELEASE, PYTHON = "bookworm", "3.11"
PYTHON_PACKAGES = (
    *(f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib"),
    *"libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libuuid1".split(),
)
# What torch and check.py import.
NEEDED = "typing_extensions filelock fsspec jinja2 MarkupSafe networkx sympy mpmath numpy safetensors==0.8.0".split()
# Tests that qemu's emulation cannot pass: its madvise does nothing, and it starts no program of another machine.
SKIPPED = (
    *("read::prefault::tests", "copying_from_a_truncated_mapping_is_an_error"),
    *("a_failed_write_leaves_nothing", "a_killed_process_leaves"),
)


def test_core() -> None:
    compiler = f"{MACHINE}-linux-gnu-gcc"
    name = TARGET.upper().replace("-", "_")
    environment = {
        **os.environ,
        f"CARGO_TARGET_{name}_LINKER": compiler,
        f"CARGO_TARGET_{name}_RUNNER": f"{QEMU} -L /usr/{MACHINE}-linux-gnu",
    }
    command = ("cargo", "test", "--quiet", "--profile=tests", "--locked", f"--target={TARGET}", "--target-dir")
    skip = [f"--skip={name}" for name in SKIPPED]
    run(*command, ROOT / "target" / MACHINE, "--no-fail-fast", "--", *skip, environment=environment)


def check_wheel(wheel: Path, torch: str, directory: Path) -> str:
    """Installs the wheel beside that torch, and returns what check.py prints."""
    root = debian_packages(MACHINE, RELEASE, PYTHON_PACKAGES, ROOT / "out" / "downloads")
    site = directory / "site-packages"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    )
    platforms = [f"--platform={name}_{MACHINE}" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    other = (
        *platforms,
        "--no-deps",
        "--no-compile",
        "--only-binary=:all:",
        f"--python-version={PYTHON}",
        "--target",
        site,
    )
    run(*pip, *other, wheel, f"torch=={torch}", *NEEDED)
    python = (QEMU, "-L", root, root / "usr" / "bin" / f"python{PYTHON}")
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/nonexistent"}
    return run(shutil.which(QEMU), *python[1:], ROOT / "tests" / "packaging" / "check.py", environment=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.10.0", help="later ones need CUDA libraries, of several GB")
    parser.add_argument("--no-core", action="store_true", help="check the wheel only")
    arguments = parser.parse_args()
    wheels = list((ROOT / "out" / "dist").glob(f"*_{MACHINE}.whl"))
    if len(wheels) != 1:
        raise SystemExit("out/dist has no wheel for aarch64; run make wheels first")
    if shutil.which(QEMU) is None:
        raise SystemExit(f"{QEMU} is missing; install it: apt-get install qemu-user-static")
    install_compilers(MACHINE, f"{MACHINE}-linux-gnu-g++")
    with tempfile.TemporaryDirectory() as directory:
        print(check_wheel(wheels[0], arguments.torch, Path(directory)), end="", flush=True)
    if not arguments.no_core:
        begin = time.monotonic()
        test_core()
        print(f"the tests of the core pass, in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
