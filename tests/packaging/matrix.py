"""One wheel, several Pythons and torches: builds it, installs it beside each, checks and times it there.

Owns the virtual environments and the table; check.py has the checks. Each combination unpacks torch with its CUDA
libraries, about 5 GB, and takes minutes, so this is not part of the tests. The environments are created and deleted one
after the other. Only the build of the wheel can find Rust.

Run: python tests/packaging/matrix.py --python python3.10 --python python3.13 --torch 2.8.0 --torch 2.11.0
         [--wheel FILE] [--cuda-of SITE] [--json FILE] [--directory DIR] [--imports N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import zipfile
from datetime import date
from pathlib import Path

from commands import ROOT, run

HERE = Path(__file__).resolve().parent
RUST = ("cargo", "rustc", "rustup")
# The reference to compare with, which saves through numpy.
REFERENCE = ("safetensors==0.8.0", "numpy")
# The imports of torch, besides its CUDA libraries, and the requirements of the wheel.
TORCH_NEEDS = ("typing_extensions", "filelock", "fsspec", "jinja2", "networkx", "sympy")
WHEEL_NEEDS = ("setuptools", "ninja")
# The wheel has these files. The core is its only compiled library.
NEEDED = (
    "_native_build.py",
    "_native_library.py",
    "py.typed",
    "native/cpp/layer.cpp",
    "native/bridge/bridge.rs.cc",
    "native/lib/libsafetensors_torch_c.a",
    "native/lib/libsafetensors_torch_c.so",
)


def build_wheel(python: str, directory: Path) -> Path:
    """Builds the wheel that fits every torch, in an isolated environment."""
    environment = {**os.environ, "SAFETENSORS_TORCH_AOT": "0"}
    pip = (python, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps")
    run(*pip, "--wheel-dir", directory, ROOT, environment=environment)
    (wheel,) = directory.glob("*.whl")
    return wheel


def check_wheel(wheel: Path) -> None:
    if not wheel.name.endswith("-py3-none-linux_x86_64.whl"):
        raise SystemExit(f"{wheel.name} is not for every Python, or not for this platform")
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in NEEDED if f"safetensors_torch/{name}" not in names]
    wrong = [
        name
        for name in names
        if (name.endswith((".so", ".o", ".pyc")) and not name.endswith("_c.so"))
        or not name.lstrip("_").startswith("safetensors_torch")
    ]
    if missing or wrong:
        raise SystemExit(f"{wheel.name} lacks {missing}, and has {wrong}")


def without_rust(directory: Path) -> dict[str, str]:
    """Returns an environment without Rust on PATH, and with a home directory, so an empty cache, in ``directory``."""
    programs = directory / "programs"
    programs.mkdir(parents=True)
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            link = programs / program.name
            if program.name not in RUST and not link.exists() and os.access(program, os.X_OK):
                link.symlink_to(program)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("CARGO", "RUST", "XDG_", "PYTHON"))
    }
    environment = {**kept, "PATH": str(programs), "HOME": str(directory)}
    for program in RUST:
        if shutil.which(program, path=environment["PATH"]):
            raise SystemExit(f"{program} could not be hidden")
    return environment


def install_torch(inside: Path, install: tuple, torch: str, cuda_of: Path | None) -> None:
    if cuda_of is None:
        run(*install, f"torch=={torch}", *REFERENCE)
        return
    run(*install, "--no-deps", f"torch=={torch}")
    run(*install, *TORCH_NEEDS, *WHEEL_NEEDS, *REFERENCE)
    site = Path(run(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for path in cuda_of.glob("nvidia*"):
        (site / path.name).symlink_to(path.resolve())


def check_one(python: str, torch: str, wheel: Path, directory: Path, imports: int, cuda_of: Path | None) -> dict:
    """Installs the wheel beside that torch, and returns the result of the check."""
    run(python, "-m", "venv", directory / "venv")
    inside = directory / "venv" / "bin" / "python"
    install = (inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    install_torch(inside, install, torch, cuda_of)  # with pip's own cache, which is in the real home directory
    environment = without_rust(directory / "home")
    # pip would write the CUDA libraries that it misses through the links, into the directory that was lent.
    lent = () if cuda_of is None else ("--no-deps",)
    run(*install, *lent, wheel, environment=environment)

    command = (inside, "-I", HERE / "check.py")
    first = json.loads(run(*command, environment=environment, directory=directory))
    if not Path(first["package"]).is_relative_to(directory):
        raise SystemExit(f"not the wheel was checked, but {first['package']}")
    later = [
        json.loads(run(*command, "--import-only", environment=environment, directory=directory)) for _ in range(imports)
    ]
    cache = directory / "home" / ".cache" / "safetensors_torch"
    (library,) = cache.rglob("*.so")
    return {
        **{name: first[name] for name in ("python", "torch", "cxx11_abi", "version", "dtypes")},
        "first_import_s": first["package_s"],
        "compiler_s": first["compiler_s"],
        "later_import_ms": 1000 * statistics.median(said["package_s"] for said in later),
        "later_import_cpu_ms": 1000 * statistics.median(said["cpu_s"] for said in later),
        "torch_import_s": statistics.median(said["torch_s"] for said in later),
        "library_bytes": library.stat().st_size,
    }


def table(results: list[dict]) -> str:
    lines = [
        "| Python | torch | dtypes | first import | compiler, CPU | later imports | these, CPU | `import torch` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(
            f"| {result['python']} | {result['torch']} | {result['dtypes']} | {result['first_import_s']:.0f} s"
            f" | {result['compiler_s']:.0f} s | {result['later_import_ms']:.0f} ms"
            f" | {result['later_import_cpu_ms']:.0f} ms | {result['torch_import_s']:.1f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", required=True, help="a Python; may be given several times")
    parser.add_argument("--torch", action="append", required=True, help="a version of it; may be given several times")
    parser.add_argument("--wheel", type=Path, help="a wheel that is there, instead of building one")
    parser.add_argument(
        "--cuda-of",
        type=Path,
        help="a site-packages directory with that torch, whose CUDA libraries (most of 5 GB) the environments link to",
    )
    parser.add_argument("--json", type=Path, help="where the results go besides, after each combination")
    parser.add_argument("--directory", type=Path, help="where the environments are made; needs about 6 GB")
    parser.add_argument("--imports", type=int, default=7, help="how many later imports are timed")
    chosen = parser.parse_args()
    results: list[dict] = []
    with tempfile.TemporaryDirectory(dir=chosen.directory, prefix="safetensors-torch-matrix-") as name:
        directory = Path(name)
        wheel = (chosen.wheel or build_wheel(chosen.python[0], directory / "dist")).resolve()
        check_wheel(wheel)
        for torch in chosen.torch:
            for python in chosen.python:
                print(f"{python}, torch {torch} ...", file=sys.stderr, flush=True)
                place = directory / "one"
                place.mkdir()
                try:
                    results.append(check_one(python, torch, wheel, place, chosen.imports, chosen.cuda_of))
                finally:
                    shutil.rmtree(place)
                if chosen.json:
                    chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{wheel.name}, {date.today().isoformat()}\n\n{table(results)}")


if __name__ == "__main__":
    main()
