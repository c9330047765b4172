"""Makes the native operators available in this process, whatever torch is installed.

Owns finding, compiling and loading the libtorch layer: the library that the package was built with where it fits
the installed torch, else one compiled here, once for each torch, from the sources and the static core that the package
carries in ``native/``. The sources' meaning is not its business. setup.py uses the names and flags below too.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NATIVE = Path(__file__).resolve().parent / "native"
# Written last by setup.py: a digest of all that goes into the compilation.
FINGERPRINT = "fingerprint"
CACHE_VARIABLE = "SAFETENSORS_TORCH_CACHE"
OLDEST_TORCH = (2, 6)
# No -std: torch.utils.cpp_extension asks for the standard that its headers need.
COMPILE_FLAGS = ["-O2", "-Wall", "-Wextra"]


def library_name() -> str:
    """The file name of a libtorch layer for the installed torch: its version and C++ ABI are in it."""
    abi = "cxx11" if torch.compiled_with_cxx11_abi() else "precxx11"
    return f"libsafetensors_torch_py-torch{torch.__version__}-{abi}.so"


def sources(native: Path) -> list[str]:
    """The C++ files to compile."""
    return [str(path) for pattern in ("cpp/layer.cpp", "bridge/*.cc") for path in sorted(native.glob(pattern))]


def include_dirs(native: Path) -> list[str]:
    """Where the sources find each other and the generated bridge."""
    return [str(native), str(native / "bridge" / "include"), str(native / "include")]


def link_flags(native: Path) -> list[str]:
    """What the library is linked from and how: the core's symbols stay inside, and no library is named in vain."""
    archives = [str(path) for path in sorted(native.glob("lib/*.a"))]
    return [*archives, "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-Wl,--as-needed", "-lpthread", "-ldl", "-lm"]


def ensure_loaded() -> None:
    """Loads the operators, unless the process has them already; compiles them first where it must.

    Raises:
        ImportError: they cannot be had; the text lists the likely causes and what to do about each.
    """
    if _registered():
        return
    if _torch_version() < OLDEST_TORCH:
        raise ImportError(
            f"safetensors_torch needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, and torch {torch.__version__}"
            " is installed. Upgrade it: pip install --upgrade torch"
        )
    if not (NATIVE / FINGERPRINT).exists():
        raise ImportError(
            f"this safetensors_torch was not built: {NATIVE} has not what setup.py puts there. Install the package (pip"
            " install safetensors-torch, or in a checkout pip install . or pip install -e .)"
        )
    shipped = NATIVE / "lib" / library_name()
    if shipped.exists() and _try_load(shipped):
        return
    _load_compiled()


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _registered() -> bool:
    """Whether a library of this project is loaded: a second one would end the process when it registers its ops."""
    namespace = torch.ops.safetensors_torch
    if not hasattr(namespace, "load_file"):
        return False
    needed = ("load", "save_file", "get_tensor", "_load_file_lists", "_load_lists", "_plan_save", "_check_save")
    if not all(
        hasattr(namespace, name)
        for name in (*needed, "_tied", "_open_bytes", "_open_checkpoint", "_transfer_options", "_last_error")
    ):
        raise ImportError(
            "another version of the safetensors_torch library is loaded in this process, and lacks operators that this"
            " package needs. Use one version of both, or import safetensors_torch first"
        )
    return True


def _try_load(library: Path) -> bool:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        print(f"safetensors_torch: {library.name} does not load ({error}); compiling instead", file=sys.stderr)
        return False
    return True


def _load_compiled() -> None:
    try:
        fingerprint = (NATIVE / FINGERPRINT).read_text(encoding="ascii").strip()
        library = _cache_folder() / fingerprint / library_name()
        if not library.exists():
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _lock(library.with_suffix(".lock")) as alone:
                if not library.exists():
                    _compile(library, alone)
                    return
        torch.ops.load_library(str(library))
    except Exception as error:
        raise ImportError(_report(error)) from error


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "safetensors_torch"


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """One process at a time. A lock that the kernel drops with the process, so none is left behind by a kill.

    Yields False where the filesystem has no locks: two processes may compile then, each in its own folder.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            print("safetensors_torch: waiting for another process that compiles it ...", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


def _compile(library: Path, alone: bool) -> None:
    """Compiles and loads the libtorch layer, and leaves it at ``library``, which appears complete or not at all."""
    from torch.utils import cpp_extension

    print(
        f"safetensors_torch: compiling its libtorch layer for torch {torch.__version__} (once, some 20 seconds of one"
        f" core), to be kept in {library.parent} ...",
        file=sys.stderr,
        flush=True,
    )
    prefix = f"{library.stem}-build-"
    if alone:
        for leftover in library.parent.glob(f"{prefix}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=library.parent) as folder, ninja_on_path():
        cpp_extension.load(
            name="safetensors_torch_native",
            sources=sources(NATIVE),
            extra_cflags=COMPILE_FLAGS,
            extra_include_paths=include_dirs(NATIVE),
            extra_ldflags=[shlex.quote(flag) for flag in link_flags(NATIVE)],
            build_directory=folder,
            is_python_module=False,
        )
        # By pattern: torch adds a counter to the name when it has compiled before in this process.
        built = next(Path(folder).glob("safetensors_torch_native*.so"))
        os.replace(built, library)


@contextmanager
def ninja_on_path() -> Iterator[None]:
    """The ninja of the Python package, whose folder is not on PATH where the environment is not activated."""
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


def _report(error: Exception) -> str:
    """Says what failed: first the likely causes that are the case here, and what to do about each, then the others."""
    words = shlex.split(os.environ.get("CXX", "c++"))
    compiler = words[0] if words else "c++"
    headers = Path(torch.__file__).parent / "include" / "torch" / "library.h"
    cache = _cache_folder()
    in_cache = isinstance(error, OSError) and str(error.filename).startswith(str(cache))
    with ninja_on_path():
        has_ninja = shutil.which("ninja") is not None
    causes = [
        (not has_ninja, "ninja", "no ninja. Install it: pip install ninja"),
        (
            shutil.which(compiler) is None,
            f"the C++ compiler ({compiler})",
            f"no C++ compiler: {compiler} is not to be found. Install g++ (apt-get install g++), or name a compiler in"
            " the environment variable CXX",
        ),
        (
            in_cache or not _is_writable(cache),
            f"the cache folder ({cache})",
            f"the cache folder {cache} cannot be written. Name another in the environment variable {CACHE_VARIABLE}",
        ),
        (
            not headers.exists(),
            "torch's C++ headers",
            f"no C++ headers of torch: {headers} is missing. Install torch from a wheel, which has them",
        ),
        (
            isinstance(error, ImportError),
            "torch.utils.cpp_extension",
            "torch.utils.cpp_extension cannot be imported. Install what it needs: pip install setuptools",
        ),
    ]
    found = [f"  - {remedy}" for is_case, _, remedy in causes if is_case]
    others = ", ".join(what for is_case, what, _ in causes if not is_case)
    lines = [f"safetensors_torch could not load its libtorch layer for torch {torch.__version__}."]
    if found:
        lines += ["Likely causes:", *found]
    lines += [
        f"{'Other causes' if found else 'Likely causes'}: a compiler too old for its headers (C++17, since torch 2.14"
        f" C++20), or a torch that this package does not know yet. These seem to be in order: {others}.",
    ]
    said = str(error).splitlines()
    # A compiler goes on after the first error, with more and more that follows from it.
    errors = [line for line in said if "error: " in line][:10]
    lines.append(f"{type(error).__name__}, the {'first errors' if errors else 'last lines'} of which are:")
    lines += [line if len(line) <= 200 else f"{line[:200]} ..." for line in errors or said[-30:]]
    return "\n".join(lines)


def _is_writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
