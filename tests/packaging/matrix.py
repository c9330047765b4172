"""One wheel, several Pythons and torches: installs it beside each, without a compiler, checks and times it there.

Owns the virtual environments and the table; check.py has the checks. Each combination unpacks torch with its CUDA
libraries, about 5 GB, and takes minutes, so this is not part of the tests. The environments are created and deleted one
after the other. Fails if the first import of the package takes longer than FIRST_IMPORT_MS beyond that of torch.

Run: python tests/packaging/matrix.py --python python3.10 --python python3.13 --torch 2.8.0 --torch 2.11.0
         [--wheel FILE] [--compile] [--cuda-of SITE] [--json FILE] [--directory DIR] [--imports N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

from commands import ROOT, run

HERE = Path(__file__).resolve().parent
# The programs that are hidden from PATH.
RUST = ("cargo", "rustc", "rustup")
COMPILERS = ("cc", "c89*", "c99*", "*gcc*", "*c++*", "*g++*", "*clang*", "make", "gmake", "ninja*", "cmake")
# The reference to compare with, which saves through numpy.
REFERENCE = ("safetensors==0.8.0", "numpy")
# The imports of torch, besides its CUDA libraries.
TORCH_NEEDS = ("typing_extensions", "filelock", "fsspec", "jinja2", "networkx", "sympy")
# Those of the extra compile.
COMPILE_NEEDS = ("setuptools", "ninja")
FIRST_IMPORT_MS = 100


def build_wheel(compiles: bool) -> Path:
    """Builds the wheel with compiled layers, or the one without."""
    run("make", "wheel" if compiles else "wheels")
    system = "linux" if compiles else "manylinux_2_28"
    (wheel,) = (ROOT / "out" / "dist").glob(f"*-{system}_{platform.machine()}.whl")
    return wheel


def check_wheel(wheel: Path, compiles: bool) -> None:
    """Checks the name and the files of the wheel."""
    if not re.search(rf"-py3-none-(manylinux_2_28|linux)_{platform.machine()}\.whl$", wheel.name):
        raise SystemExit(f"{wheel.name} is not for every Python, or not for this platform")
    names = zipfile.ZipFile(wheel).namelist()
    if not compiles and not any(re.search(r"/native/lib/[^/]*-torch[\d.]+-(pre)?cxx11\.so$", name) for name in names):
        raise SystemExit(f"{wheel.name} has no compiled layers; build it with make wheels, or try it with --compile")
    wrong = [
        name
        for name in names
        if (name.endswith(".so") and "/native/lib/" not in name)
        or name.endswith((".o", ".pyc"))
        or not name.lstrip("_").startswith("safetensors_torch")
    ]
    if wrong:
        raise SystemExit(f"{wheel.name} has {wrong}")


def without(hidden: tuple[str, ...], directory: Path) -> dict[str, str]:
    """Returns an environment without those programs, and with a home directory, so an empty cache, in ``directory``."""
    programs = directory / "programs"
    programs.mkdir(parents=True)
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            link = programs / program.name
            is_hidden = any(fnmatch(program.name, pattern) for pattern in hidden)
            if not is_hidden and not link.exists() and os.access(program, os.X_OK):
                link.symlink_to(program)
    dropped = ("CARGO", "RUST", "XDG_", "PYTHON", "CC", "CXX", "SAFETENSORS_TORCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PATH": str(programs), "HOME": str(directory)}


def install_torch(inside: Path, install: tuple, torch: str, cuda_of: Path | None) -> None:
    if cuda_of is None:
        run(*install, f"torch=={torch}", *REFERENCE)
        return
    run(*install, "--no-deps", f"torch=={torch}")
    run(*install, *TORCH_NEEDS, *REFERENCE)
    site = Path(run(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Until torch 2.6, one of them is not in the directory nvidia.
    for path in (*cuda_of.glob("nvidia*"), *cuda_of.glob("cusparselt*")):
        (site / path.name).symlink_to(path.resolve())


def check_one(python: str, torch: str, wheel: Path, directory: Path, chosen: argparse.Namespace) -> dict:
    """Installs the wheel beside that torch, and returns the result of the check."""
    run(python, "-m", "venv", directory / "venv")
    inside = directory / "venv" / "bin" / "python"
    install = (inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # With pip's own cache, which is in the real home directory.
    install_torch(inside, (*install, "--no-compile"), torch, chosen.cuda_of)
    if chosen.compile:
        run(*install, *COMPILE_NEEDS)
    environment = without(RUST if chosen.compile else (*RUST, *COMPILERS), directory / "home")
    # pip would write the CUDA libraries that it misses through the links, into the directory that was lent.
    lent = () if chosen.cuda_of is None else ("--no-deps",)
    start = time.perf_counter()
    run(*install, *lent, wheel, environment=environment)
    install_s = time.perf_counter() - start

    command = (inside, "-I", HERE / "check.py")
    first = json.loads(run(*command, environment=environment, directory=directory))
    if not Path(first["package"]).is_relative_to(directory):
        raise SystemExit(f"not the wheel was checked, but {first['package']}")
    first_ms = 1000 * first["package_s"]
    was_compiled = any((directory / "home" / ".cache").rglob("*.so"))
    if was_compiled != chosen.compile:
        raise SystemExit(f"torch {torch}: the first import compiled {'a' if was_compiled else 'no'} layer")
    if not chosen.compile and first_ms > FIRST_IMPORT_MS:
        raise SystemExit(f"torch {torch}: the first import took {first_ms:.0f} ms, more than {FIRST_IMPORT_MS}")
    later = [
        json.loads(run(*command, "--import-only", environment=environment, directory=directory))
        for _ in range(chosen.imports)
    ]
    return {
        **{name: first[name] for name in ("python", "torch", "cxx11_abi", "version", "dtypes")},
        "install_s": install_s,
        "first_import_ms": first_ms,
        "later_import_ms": 1000 * statistics.median(said["package_s"] for said in later),
        "torch_import_s": statistics.median(said["torch_s"] for said in later),
    }


def table(results: list[dict]) -> str:
    lines = [
        "| Python | torch | dtypes | pip install, s | first import, ms | later imports, ms | `import torch`, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(
            f"| {result['python']} | {result['torch']} | {result['dtypes']} | {result['install_s']:.1f}"
            f" | {result['first_import_ms']:.0f} | {result['later_import_ms']:.0f} | {result['torch_import_s']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", required=True, help="a Python; may be given several times")
    parser.add_argument("--torch", action="append", required=True, help="a version of it; may be given several times")
    parser.add_argument("--wheel", type=Path, help="an existing wheel; default: that of make wheels")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="for a torch without a layer in the wheel: the first import must compile one; default wheel: make wheel",
    )
    parser.add_argument(
        "--cuda-of",
        type=Path,
        help="a site-packages directory with that torch, whose CUDA libraries (most of 5 GB) the environments link to",
    )
    parser.add_argument("--json", type=Path, help="where the results go besides, after each combination")
    parser.add_argument("--directory", type=Path, help="where the environments are made; needs about 6 GB")
    parser.add_argument("--imports", type=int, default=7, help="how many later imports are timed")
    chosen = parser.parse_args()
    wheel = (chosen.wheel or build_wheel(chosen.compile)).resolve()
    check_wheel(wheel, chosen.compile)
    results: list[dict] = []
    with tempfile.TemporaryDirectory(dir=chosen.directory, prefix="safetensors-torch-matrix-") as name:
        for torch in chosen.torch:
            for python in chosen.python:
                print(f"{python}, torch {torch} ...", file=sys.stderr, flush=True)
                place = Path(name) / "one"
                place.mkdir()
                try:
                    results.append(check_one(python, torch, wheel, place, chosen))
                finally:
                    shutil.rmtree(place)
                if chosen.json:
                    chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{wheel.name}, {date.today().isoformat()}\n\n{table(results)}")


if __name__ == "__main__":
    main()
