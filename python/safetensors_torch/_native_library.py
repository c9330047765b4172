"""Loads the native operators for whatever torch is installed.

Owns finding, compiling and loading the libtorch layer: the library that the package was built with if it fits the
installed torch, otherwise one compiled here, once for each torch, from the sources and the static core in ``native/``.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import struct
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from . import _native_build

PROJECT = "safetensors-torch"
NATIVE = Path(__file__).resolve().parent / "native"
# A digest of everything that is compiled, which setup.py writes last.
FINGERPRINT = "fingerprint"
CACHE_VARIABLE = "SAFETENSORS_TORCH_CACHE"


def library_name() -> str:
    """Returns the file name of the layer for exactly the installed torch."""
    return _native_build.library_name(torch.__version__, torch.compiled_with_cxx11_abi())


def shipped_libraries() -> list[Path]:
    """Returns where the package may have a layer for the installed torch: for exactly it, or for its minor version."""
    minor = _native_build.minor_library_name(torch.__version__, torch.compiled_with_cxx11_abi())
    return [NATIVE / "lib" / name for name in (library_name(), minor) if name]


def extension_link_args() -> list[str]:
    """Returns the linker's arguments for a C++ extension that includes ``safetensors_torch.hpp``.

    They link a hidden copy of the C library. ``include_path`` is the directory of the headers. The extension must be
    built with the version of this package that it runs with, and needs its import before the first call.

    The list is a new one for each call, because torch.utils.cpp_extension.load extends its argument.

    Example:
        >>> from torch.utils.cpp_extension import CppExtension
        >>> extension = CppExtension(
        ...     "app", ["app.cpp"], include_dirs=[include_path], extra_link_args=extension_link_args()
        ... )
    """
    # Hidden, because the process has other copies.
    return [*_native_build.core_link_flags(NATIVE), "-Wl,--exclude-libs,libsafetensors_torch_c.a"]


def ensure_loaded() -> None:
    """Loads the operators, unless the process has them already. Compiles the layer first if there is none that fits.

    Raises:
        ImportError: they cannot be loaded; the text has the likely causes and their remedies.
    """
    if _registered():
        return
    if _torch_version() < _native_build.OLDEST_TORCH:
        oldest = ".".join(map(str, _native_build.OLDEST_TORCH))
        raise ImportError(
            f"safetensors_torch needs torch {oldest} or later, and torch {torch.__version__} is installed. Upgrade it:"
            " pip install --upgrade torch"
        )
    if not (NATIVE / FINGERPRINT).exists():
        raise ImportError(
            f"safetensors_torch is not built: setup.py has not filled {NATIVE}. Install the package (pip install"
            " safetensors-torch, or in a checkout pip install . or pip install -e .)"
        )
    if not any(_load(library) for library in shipped_libraries()):
        _load_compiled()


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _registered() -> bool:
    """Returns whether another library of this project, such as a C++ extension's, has registered the operators.

    Raises:
        ImportError: it has another version.
    """
    namespace = torch.ops.safetensors_torch
    if not hasattr(namespace, "load_file"):
        return False
    loaded, own = namespace._built_for()[0] if hasattr(namespace, "_built_for") else "unknown", version(PROJECT)
    if loaded != own:
        raise ImportError(
            f"another version of the safetensors_torch library is loaded in this process: {loaded}, and this package is"
            f" {own}. Use the same version of both"
        )
    return True


def _load(library: Path) -> bool:
    """Loads ``library`` and returns True, or False if it is missing or does not load, which is printed."""
    try:
        if not _is_complete(library):
            raise OSError("it is truncated or damaged")
        torch.ops.load_library(str(library))
    except FileNotFoundError:
        return False
    except OSError as error:
        print(f"safetensors_torch: {library} does not load ({error}); compiling a new one", file=sys.stderr)
        return False
    return True


def _is_complete(library: Path) -> bool:
    """Returns whether an ELF file has the length that its header implies. Loading a truncated one may crash."""
    with open(library, "rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False
    # The section table, which linkers write last: its offset, the size of an entry, and the number of entries.
    (start,), (entry, count) = struct.unpack_from("=Q", header, 0x28), struct.unpack_from("=HH", header, 0x3A)
    return size >= start + entry * count


def _load_compiled() -> None:
    """Loads the layer of the cache; compiles it first if it is missing or does not load."""
    from . import _native_cache  # not above: setup.py loads this file by itself

    try:
        library = _native_cache.library()
        if _load(library):
            return
        before = _identity(library)
        _refuse_missing_tools()
        with _native_cache.lock(library) as is_locked:
            # Another process may have compiled it while this one waited.
            if _identity(library) == before or not _load(library):
                _compile(library, is_locked)
    except (OSError, RuntimeError) as error:
        raise ImportError(_report(error)) from None


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _why_compile() -> tuple[str, str]:
    """Returns why no layer of the package serves, and a remedy, or an empty string if there is none."""
    if any(library.exists() for library in shipped_libraries()):
        return "the layer of this package does not load", f"pip install --force-reinstall --no-deps {PROJECT}"
    versions = _native_build.layer_versions(NATIVE / "lib", torch.compiled_with_cxx11_abi())
    if not versions:
        return "this package has no compiled layers", ""
    reason = f"this package has compiled layers only for the releases of torch {', '.join(versions)}"
    return reason, "install one of these releases of torch"


def _compile(library: Path, is_locked: bool) -> None:
    """Compiles and loads the libtorch layer, and installs it at ``library``."""
    from torch.utils import cpp_extension

    from . import _native_cache

    print(
        f"safetensors_torch: compiling its libtorch layer for torch {torch.__version__} into {library.parent} (once,"
        f" 25 to 50 s of processor time), because {_why_compile()[0]} ...",
        file=sys.stderr,
        flush=True,
    )
    prefix = f"{library.stem}-build-"
    if is_locked:
        for leftover in library.parent.glob(f"{prefix}*"):  # left by a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=library.parent) as directory, _native_build.ninja_on_path():
        cpp_extension.load(
            name="safetensors_torch_native",
            sources=_native_build.sources(NATIVE),
            extra_cflags=_native_build.COMPILE_FLAGS,
            extra_include_paths=_native_build.include_dirs(NATIVE),
            extra_ldflags=[shlex.quote(flag) for flag in _native_build.link_flags(NATIVE, library.name)],
            build_directory=directory,
            is_python_module=False,
        )
        # A pattern, because torch adds a counter to the name if it compiled before in this process.
        _native_cache.install(next(Path(directory).glob("safetensors_torch_native*.so")), library)


def _refuse_missing_tools() -> None:
    """Raises ImportError, with the remedies, if a tool for compiling is missing."""
    words = shlex.split(os.environ.get("CXX", "c++"))
    compiler = words[0] if words else "c++"
    headers = Path(torch.__file__).parent / "include" / "torch" / "library.h"
    with _native_build.ninja_on_path():
        has_ninja = shutil.which("ninja") is not None
    missing = {
        f"a C++ compiler ({compiler})": (
            shutil.which(compiler) is None,
            "install g++ (apt-get install g++), or name a compiler in the environment variable CXX",
        ),
        "ninja": (not has_ninja, f"pip install '{PROJECT}[compile]'"),
        "setuptools": (importlib.util.find_spec("setuptools") is None, f"pip install '{PROJECT}[compile]'"),
        f"torch's C++ headers ({headers})": (not headers.exists(), "install torch from a wheel, which has them"),
    }
    found = {what: remedy for what, (is_missing, remedy) in missing.items() if is_missing}
    if found:
        reason, remedy = _why_compile()
        tools = "; ".join(dict.fromkeys(found.values()))
        raise ImportError(
            f"safetensors_torch must compile its libtorch layer for torch {torch.__version__} once, because"
            f" {reason}; it lacks {', '.join(found)}.\n"
            f"What to do: {', or '.join(filter(None, [remedy, tools]))}.\n"
            f"Or compile it on another machine of this kind, and set {CACHE_VARIABLE} to a copy of its cache directory."
        )


def _report(error: Exception) -> str:
    """Returns the error's text: what failed, the likely causes, and the compiler's first errors."""
    what = f"safetensors_torch could not compile its libtorch layer for torch {torch.__version__}"
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"{what}: {error.filename} cannot be used ({error.strerror}); name another cache directory in the"
            f" environment variable {CACHE_VARIABLE}"
        )
    output = str(error).splitlines()
    # A compiler continues after the first error, and reports ever more consequences of it.
    errors = [line for line in output if "error: " in line][:10]
    lines = [
        f"{what}. Likely causes: a compiler too old for torch's headers (C++17, since torch 2.14 C++20), or a torch"
        " newer than this package.",
        f"{type(error).__name__}, the {'first errors' if errors else 'last lines'} of which are:",
        *(line if len(line) <= 200 else f"{line[:200]} ..." for line in errors or output[-30:]),
    ]
    return "\n".join(lines)
