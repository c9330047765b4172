"""How the libtorch layer is found, compiled and loaded.

Every case is a process of its own. The package is copied without its ahead-of-time library where compilation at first
import is what is tested.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fresh
import safetensors_torch
from safetensors_torch import _native_build, _native_library
from test_native_symbols import expect_portable

pytestmark = pytest.mark.slow

PACKAGE = Path(safetensors_torch.__file__).parent
SHIPPED = PACKAGE / "native" / "lib" / _native_library.library_name()
COMPILING = "safetensors_torch: compiling"

# Imports and uses the package, and prints the mapped libraries of its name and the time of the import.
USE = """
    import time
    import torch
    start = time.monotonic()
    import safetensors_torch
    took = time.monotonic() - start
    data = safetensors_torch.save({"weight": torch.arange(5.0)}, {"format": "pt"})
    assert torch.equal(safetensors_torch.load(data)["weight"], torch.arange(5.0))
    assert torch.classes.safetensors_torch.File
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[-1] for line in maps if "safetensors_torch" in line and ".so" in line}
    print("package", safetensors_torch.__file__)
    print("took", took)
    for path in mapped:
        print("mapped", path)
"""

needs_shipped = pytest.mark.skipif(not SHIPPED.exists(), reason="installed without an ahead-of-time library")


def start(program: str, **variables: str | None) -> fresh.Process:
    """Starts a program in a Python that has imported torch, without a cache unless one is named."""
    return fresh.Process(program, **{_native_library.CACHE_VARIABLE: "/proc/none", **variables})


def execute(program: str, prepare: Callable[[], None] | None = None, **variables: str) -> subprocess.Popen:
    """Starts a program in a new Python, which calls `prepare` before it is executed."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, _native_library.CACHE_VARIABLE: "/proc/none", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def outcome(process: fresh.Process | subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=600)
    return process.returncode, stdout, stderr


def said(stdout: str, what: str) -> list[str]:
    return re.findall(rf"^{what} (.*)$", stdout, re.MULTILINE)


def copy_package(directory: Path) -> Path:
    """Copies the installed package, without any library for torch, to `directory` for PYTHONPATH."""
    shutil.copytree(PACKAGE, directory / "safetensors_torch", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return directory


def make_compiler(directory: Path, script: str) -> str:
    """Returns a compiler for CXX that runs `script` when it has to compile, and g++ otherwise."""
    compiler = directory / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) ;; *) exec c++ "$@" ;; esac\n{script}\n')
    compiler.chmod(0o755)
    return str(compiler)


def kill_while_compiling(directory: Path, environment: dict[str, str]) -> list[Path]:
    """Kills a process that compiles, and its compilers. Returns what it left behind."""
    # Writes its pid to its output file, the last argument, and then runs for longer than this test.
    compiler = make_compiler(
        directory, 'for out; do :; done; echo $$ >"$out.part" && mv "$out.part" "$out"; exec sleep 600'
    )
    process = execute(USE, **{**environment, "CXX": compiler})
    cache = Path(environment[_native_library.CACHE_VARIABLE])
    deadline = time.monotonic() + 300
    while not list(cache.rglob("layer.o")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    for half in cache.rglob("*.o"):
        os.kill(int(half.read_text()), signal.SIGKILL)
    process.communicate()
    return list(cache.rglob("*.o"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A copy that two processes imported at the same time, after a third was killed while it compiled, with an empty
    library in the cache."""
    directory = tmp_path_factory.mktemp("first_import")
    environment = {
        "PYTHONPATH": str(copy_package(directory / "site")),
        _native_library.CACHE_VARIABLE: str(directory / "cache"),
        "CXX": make_compiler(tmp_path_factory.mktemp("unoptimized"), 'exec c++ "$@" -O0'),  # half as long
    }
    left = kill_while_compiling(directory, environment)
    # A power cut could leave an empty library before libraries were synchronised to the disk.
    (lock,) = (directory / "cache").rglob("*.lock")
    lock.with_suffix(".so").touch()
    processes = [start(USE, **environment) for _ in range(2)]
    outcomes = [outcome(process) for process in processes]
    return {"directory": directory, "environment": environment, "outcomes": outcomes, "left": left}


def test_first_import_compiles_once(compiled: dict) -> None:
    for status, stdout, stderr in compiled["outcomes"]:
        assert status == 0, stderr
        assert said(stdout, "package") == [str(compiled["directory"] / "site" / "safetensors_torch" / "__init__.py")]
        assert "Traceback" not in stderr
    messages = [stderr for _, _, stderr in compiled["outcomes"]]
    assert all(".so does not load (it is truncated or damaged); compiling a new one" in said for said in messages)
    assert sum(COMPILING in message for message in messages) == 1, messages
    assert sum("waiting" in message for message in messages) == 1, messages
    (library,) = libraries(compiled)
    announcement = f"for torch {torch.__version__} into {library.parent} (once, 25 to 50 s of processor time)"
    assert f"{announcement}, because this package has no compiled layers ..." in "".join(messages)


def libraries(compiled: dict):
    return (compiled["directory"] / "cache").rglob("*.so")


def test_nothing_but_the_library_stays_in_the_cache(compiled: dict) -> None:
    assert compiled["left"], "the process that was killed left nothing, so that nothing is shown here"
    files = [path for path in (compiled["directory"] / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".so", ".lock"}, files


def test_the_compiled_library_is_portable(compiled: dict) -> None:
    (library,) = libraries(compiled)
    expect_portable(library)


def test_second_import_is_quick_and_silent(compiled: dict) -> None:
    status, stdout, stderr = outcome(start(USE, **{**compiled["environment"], "CXX": "/nonexistent/c++"}))
    assert status == 0, stderr
    assert stderr == ""
    # Both of the first two had to wait for the compiler.
    first = min(float(said(stdout, "took")[0]) for _, stdout, _ in compiled["outcomes"])
    assert float(said(stdout, "took")[0]) < first / 2
    assert said(stdout, "mapped") == [str(path) for path in libraries(compiled)]


@pytest.mark.parametrize("place", ["cache", pytest.param("package", marks=needs_shipped)])
def test_a_torch_that_was_replaced_gets_a_layer_of_its_own(place: str, compiled: dict) -> None:
    """The library for the former torch exists and would load, but its symbols may have changed."""
    program = """
    import torch
    torch.__version__ = type(torch.__version__)("2.99.0+other")
    """
    environment = compiled["environment"] if place == "cache" else {}
    status, stdout, stderr = outcome(start(program + REPORT, **{**environment, "CXX": "/nonexistent/c++"}))
    assert status == 0, stderr
    assert "libtorch layer for torch 2.99.0+other" in stdout, stdout


@pytest.mark.parametrize("has_library", [True, False])
def test_a_read_only_cache(has_library: bool, compiled: dict, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if has_library:
        shutil.copytree(compiled["directory"] / "cache", cache)
    else:
        cache.mkdir()
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    program = f"""
    import os
    assert not os.access({str(cache)!r}, os.W_OK)
    """
    status, _, stderr = outcome(execute(program, obey_permissions))
    if status:
        pytest.skip(f"this user can write everywhere: {stderr}")
    environment = {**compiled["environment"], _native_library.CACHE_VARIABLE: str(cache)}
    status, stdout, stderr = outcome(execute(USE if has_library else REPORT, obey_permissions, **environment))
    assert (status, stderr) == (0, "")
    if has_library:
        assert said(stdout, "mapped") == [str(path) for path in cache.rglob("*.so")]
    else:
        assert re.search(rf"{re.escape(str(cache))}/\S* cannot be used \(Permission denied\)", stdout), stdout
    for directory in [cache, *cache.rglob("*")]:
        directory.chmod(0o755)  # so that pytest can delete it


def obey_permissions() -> None:
    """Has the program that comes next obey the permissions of files, root's too: it cannot have the right to pass over
    them (CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_library_that_does_not_load_is_replaced(compiled: dict, tmp_path: Path) -> None:
    site = copy_package(tmp_path / "site")
    broken = site / "safetensors_torch" / "native" / "lib" / _native_library.library_name()
    broken.write_bytes(b"\x7fELF, and no more")
    status, stdout, stderr = outcome(start(USE, **{**compiled["environment"], "PYTHONPATH": str(site)}))
    assert status == 0, stderr
    assert broken.name in stderr
    assert COMPILING not in stderr, "the cache has one"
    assert said(stdout, "mapped") == [str(path) for path in libraries(compiled)]


@needs_shipped
def test_the_shipped_library_is_loaded_silently() -> None:
    status, stdout, stderr = outcome(start(USE, CXX="/nonexistent/c++"))
    assert (status, stderr) == (0, "")
    assert said(stdout, "mapped") == [str(SHIPPED)]


def pretend(version: str) -> str:
    """Returns the start of a program that sees another version of torch."""
    return f"""
    import torch
    torch.__version__ = type(torch.__version__)({version!r})
    """


MINOR = ".".join(torch.__version__.split(".")[:2])


def package_with_layers(directory: Path, *versions: str) -> Path:
    """Copies the package with the shipped layer under the names of layers for several minor versions of torch."""
    site = copy_package(directory)
    for version in versions:
        shutil.copy(SHIPPED, site / "safetensors_torch" / "native" / "lib" / _native_build.library_name(version, True))
    return site


@needs_shipped
@pytest.mark.parametrize("patch", ["0", "7+cu130"])
def test_a_layer_for_the_minor_version_serves_its_releases(patch: str, tmp_path: Path) -> None:
    site = package_with_layers(tmp_path / "site", MINOR, "2.98")
    program = pretend(f"{MINOR}.{patch}") + USE
    status, stdout, stderr = outcome(start(program, PYTHONPATH=str(site), CXX="/nonexistent/c++"))
    assert (status, stderr) == (0, "")
    layer = _native_build.minor_library_name(torch.__version__, True)
    assert said(stdout, "mapped") == [str(site / "safetensors_torch" / "native" / "lib" / layer)]


# A later minor version, and a pre-release, which may have other symbols than the release.
UNSERVED = ["2.99.0", f"{MINOR}.0a0+git1234567"]


@needs_shipped
@pytest.mark.parametrize("version", UNSERVED)
def test_a_torch_without_a_layer_compiles_and_says_why(version: str, tmp_path: Path) -> None:
    compiler = make_compiler(tmp_path, "exit 1")
    environment = {
        "PYTHONPATH": str(package_with_layers(tmp_path / "site", "2.6", MINOR, "2.9")),
        _native_library.CACHE_VARIABLE: str(tmp_path / "cache"),
        "CXX": compiler,
    }
    status, stdout, stderr = outcome(start(pretend(version) + REPORT, **environment))
    assert status == 0
    assert f"compiling its libtorch layer for torch {version} into {tmp_path / 'cache'}/" in stderr
    assert f", because this package has compiled layers only for the releases of torch 2.6, 2.9, {MINOR} ..." in stderr
    assert f"could not compile its libtorch layer for torch {version}" in stdout, "the compiler was called"


@needs_shipped
@pytest.mark.parametrize("version", UNSERVED)
def test_without_a_compiler_the_error_names_the_layers(version: str, tmp_path: Path) -> None:
    site = package_with_layers(tmp_path / "site", "2.6", MINOR, "2.9")
    status, stdout, stderr = outcome(start(pretend(version) + REPORT, PYTHONPATH=str(site), CXX="/nonexistent/c++"))
    assert (status, stderr) == (0, "")
    what, remedy, _ = stdout.splitlines()
    assert f"for torch {version} once, because this package has compiled layers only for the releases of torch" in what
    assert f"of torch 2.6, 2.9, {MINOR}; it lacks a C++ compiler (/nonexistent/c++)." in what
    assert remedy.startswith("What to do: install one of these releases of torch, or install g++ "), remedy


def test_without_a_compiler_a_damaged_layer_is_reported(tmp_path: Path) -> None:
    site = copy_package(tmp_path / "site")
    (site / "safetensors_torch" / "native" / "lib" / _native_library.library_name()).touch()
    status, stdout, stderr = outcome(start(REPORT, PYTHONPATH=str(site), CXX="/nonexistent/c++"))
    assert status == 0, stderr
    assert "once, because the layer of this package does not load; it lacks a C++ compiler" in stdout
    assert "What to do: pip install --force-reinstall --no-deps safetensors-torch, or install g++ " in stdout


@needs_shipped
def test_ops_of_another_copy_are_used(tmp_path: Path) -> None:
    """A second library that registers the same operators would abort the process."""
    other = tmp_path / "libsafetensors_torch_other.so"
    shutil.copy(SHIPPED, other)
    load_first = f"""
    import torch
    torch.ops.load_library({str(other)!r})
    """
    status, stdout, stderr = outcome(start(load_first + USE))
    assert (status, stderr) == (0, "")
    assert said(stdout, "mapped") == [str(other)]


@needs_shipped
def test_the_library_alone_needs_no_package(tmp_path: Path) -> None:
    program = f"""
    import sys
    import torch
    torch.ops.load_library({str(SHIPPED)!r})
    data = torch.ops.safetensors_torch.save({{"a": torch.ones(3)}})
    assert torch.equal(torch.ops.safetensors_torch.load(data)["a"], torch.ones(3))
    torch.ops.safetensors_torch.save_file({{"a": torch.ones(3)}}, {str(tmp_path / "out")!r})
    assert "safetensors_torch" not in sys.modules
    """
    assert outcome(start(program)) == (0, "", "")
    assert safetensors_torch.load_file(tmp_path / "out")["a"].tolist() == [1.0, 1.0, 1.0]


def test_ops_of_another_version_are_reported() -> None:
    program = """
    import torch
    library = torch.library.Library("safetensors_torch", "DEF")
    library.define("load_file(str filename) -> Tensor")
    try:
        import safetensors_torch
    except ImportError as error:
        print(error)
    """
    status, stdout, stderr = outcome(start(program))
    assert (status, stderr) == (0, "")
    assert "another version" in stdout


OTHER = re.sub("[0-9]", "9", safetensors_torch.__version__)


def other_version(directory: Path) -> Path:
    """Returns a copy of the shipped library that reports the version OTHER."""
    copy = directory / "other.so"
    said = f"safetensors_torch {safetensors_torch.__version__} built".encode()
    blob = SHIPPED.read_bytes()
    assert blob.count(said) == 1
    copy.write_bytes(blob.replace(said, f"safetensors_torch {OTHER} built".encode()))
    return copy


@needs_shipped
def test_a_library_of_another_version_is_reported(tmp_path: Path) -> None:
    load_first = f"""
    import torch
    torch.ops.load_library({str(other_version(tmp_path))!r})
    """
    status, stdout, stderr = outcome(start(load_first + REPORT))
    assert (status, stderr) == (0, "")
    assert f"{OTHER}, and this package is {safetensors_torch.__version__}" in stdout


@needs_shipped
def test_a_second_copy_leaves_the_operators_alone(tmp_path: Path) -> None:
    """A C++ extension may load a copy before or after the import."""
    copy = shutil.copy(SHIPPED, tmp_path / "libsafetensors_torch_copy.so")
    load = f"""
    import torch
    torch.ops.load_library({str(copy)!r})
    """
    for program in (USE + load + USE, load + USE):
        status, stdout, stderr = outcome(start(program))
        assert (status, stderr) == (0, "")
        assert str(copy) in said(stdout, "mapped")


REPORT = """
    try:
        import safetensors_torch
    except ImportError as error:
        print(error)
    else:
        print("imported")
"""


@pytest.mark.parametrize("how", ["CXX", "PATH"])
def test_a_missing_compiler_is_reported(how: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    missing = {"CXX": "/nonexistent/c++"} if how == "CXX" else {"CXX": None, "PATH": str(tmp_path)}
    environment = {
        "PYTHONPATH": str(copy_package(tmp_path / "site")),
        _native_library.CACHE_VARIABLE: str(cache),
        **missing,
    }
    program = (
        REPORT
        + """
    import sys
    print("torch.utils.cpp_extension" in sys.modules)
    """
    )
    status, stdout, stderr = outcome(start(program, **environment))
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    assert len(lines) == 4 and lines[3] == "False", stdout
    assert f"libtorch layer for torch {torch.__version__} once, because this package has no compiled layers" in lines[0]
    assert f"; it lacks a C++ compiler ({missing['CXX'] or 'c++'})." in lines[0], "ninja and the headers are there"
    assert "apt-get install g++" in lines[1] and "variable CXX" in lines[1]
    assert _native_library.CACHE_VARIABLE in lines[2] and lines[2].endswith(".")
    assert not cache.exists()


@pytest.mark.parametrize("missing", ["ninja", "setuptools"])
def test_missing_build_tools_are_an_extra_of_the_package(missing: str, tmp_path: Path) -> None:
    """The name of the extra is in the metadata, too."""
    (tmp_path / "c++").symlink_to("/bin/true")
    program = f"""
    import sys
    sys.modules[{missing!r}] = None
    """
    environment = {"PYTHONPATH": str(copy_package(tmp_path / "site")), "CXX": None, "PATH": str(tmp_path)}
    status, stdout, stderr = outcome(start(program + REPORT, **environment))
    assert (status, stderr) == (0, "")
    assert f"; it lacks {missing}.\nWhat to do: pip install 'safetensors-torch[compile]'.\n" in stdout
    requirements = importlib.metadata.requires("safetensors-torch")
    compiling = {name for name in requirements if name.endswith('extra == "compile"')}
    assert compiling == {'ninja; extra == "compile"', 'setuptools; extra == "compile"'}
    assert [name for name in requirements if "extra" not in name] == ["torch>=2.6"]


def test_the_import_without_a_compiler_shows_one_traceback(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(copy_package(tmp_path / "site")), "CXX": "/nonexistent/c++"}
    status, _, stderr = outcome(
        start("import safetensors_torch", **environment, **{_native_library.CACHE_VARIABLE: str(tmp_path)})
    )
    assert status == 1
    assert stderr.count("Traceback") == 1
    assert len(stderr[stderr.index("ImportError: ") :].splitlines()) == 3


def test_the_first_errors_of_the_compiler_are_reported(tmp_path: Path) -> None:
    """The last errors are consequences of the first."""
    script = (
        "echo 'a.h:1:2: error: the cause'; seq -f 'a.h:%g:1: error: what follows' 2 1000; seq -f 'note %g' 99; exit 1"
    )
    environment = {
        "PYTHONPATH": str(copy_package(tmp_path / "site")),
        _native_library.CACHE_VARIABLE: str(tmp_path / "cache"),
        "CXX": make_compiler(tmp_path, script),
    }
    status, stdout, _ = outcome(start(REPORT, **environment))
    assert status == 0
    assert "error: the cause" in stdout, stdout
    assert len(stdout.splitlines()) < 20, stdout


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    environment = {
        "PYTHONPATH": str(copy_package(tmp_path / "site")),
        _native_library.CACHE_VARIABLE: str(tmp_path / "file" / "cache"),
    }
    status, stdout, stderr = outcome(start(REPORT, **environment))
    assert (status, stderr) == (0, "")
    cache = re.escape(environment[_native_library.CACHE_VARIABLE])
    assert re.search(rf"{cache} cannot be used .*{_native_library.CACHE_VARIABLE}", stdout), stdout
    assert "install g++" not in stdout, "the compiler is there"
