"""SAFETENSORS_TORCH_PATCH=1: the .pth file, the import hook, and programs that cannot be patched.

Most programs here run with stubs of safetensors, safetensors_torch and torch, whose import takes seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import files
from pathlib import Path

import pytest
import safetensors

import safetensors_torch

SITE = Path(safetensors_torch.__file__).parents[1]
START_FILE = "safetensors_torch_patch.pth"
START_MODULE = "_safetensors_torch_start"

# A package that prints its actions.
STUB = """
import torch
print("imported", __name__)
def patch_safetensors():
    import safetensors.torch
    print("patched, complete:", safetensors.complete and torch.complete)
"""
# The output of a program that imports torch and safetensors.
PATCHED = ["imported safetensors_torch", "imported safetensors.torch", "patched, complete: True"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages directory with the start file and stubs of the packages."""
    directory = tmp_path / "site"
    directory.mkdir()
    for name in (START_FILE, f"{START_MODULE}.py"):
        shutil.copy(SITE / name, directory)
    add(directory, "safetensors", "print('imported', __name__)\ncomplete = True")
    (directory / "safetensors" / "torch.py").write_text("import torch\nprint('imported', __name__)\n")
    add(directory, "torch", "print('imported', __name__)\ncomplete = True")
    add(directory, "safetensors_torch", STUB)
    return directory


def add(site: Path, package: str, source: str) -> None:
    (site / package).mkdir(exist_ok=True)
    (site / package / "__init__.py").write_text(source)


def run(site: Path | None, program: str, value: str | None) -> tuple[list[str], str]:
    """What ``program`` prints and says on the standard error, where Python has read the start files in ``site``.

    Without the site-packages of this Python, which may have a start file too: with those, where it is None.
    """
    environment = {name: text for name, text in os.environ.items() if name != "SAFETENSORS_TORCH_PATCH"}
    if value is not None:
        environment["SAFETENSORS_TORCH_PATCH"] = value
    directory = SITE if site is None else site
    flags = [] if site is None else ["-S", "-E"]
    start = f"import site; site.addsitedir({str(directory)!r})\n"
    command = [sys.executable, *flags, "-c", start + textwrap.dedent(program)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


IMPORT = "import safetensors, torch; print('complete', safetensors.complete)"
IMPORTED = ["imported safetensors", "imported torch"]


@pytest.mark.parametrize("value", [None, "", "0", "false", "No", " off "])
def test_without_the_variable_nothing_happens(value: str | None, site: Path) -> None:
    look = """
    import sys
    print([type(f).__name__ for f in sys.meta_path])
    """
    bare, _ = run(site.parent, look, None)
    assert run(site, look, value) == (bare, "")
    if value in (None, "", "0"):
        modules = "import sys; print([name for name in sys.modules if 'safetensors' in name])"
        assert run(site, modules, value) == (["[]"], "")
    assert run(site, IMPORT, value) == ([*IMPORTED, "complete True"], "")


@pytest.mark.parametrize("value", ["1", "true", "Yes", " ON "])
def test_values_that_patch(value: str, site: Path) -> None:
    assert run(site, IMPORT, value) == ([*IMPORTED, *PATCHED, "complete True"], "")


def test_the_first_import_patches(site: Path) -> None:
    program = """
    import sys
    print(sorted(name for name in sys.modules if "safetensors" in name))
    import safetensors, torch
    print("imported by the program")
    import safetensors
    print(any(type(finder).__module__ == "_safetensors_torch_start" for finder in sys.meta_path))
    for module in (safetensors, torch):
        print(type(module.__loader__).__name__, module.__spec__.loader is module.__loader__)
    """
    lines, errors = run(site, program, "1")
    assert errors == ""
    assert lines == [
        "['_safetensors_torch_start']",
        *IMPORTED,
        *PATCHED,
        "imported by the program",
        "False",
        "SourceFileLoader True",
        "SourceFileLoader True",
    ]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import torch, safetensors", ["imported torch", "imported safetensors"]),
        # The patch waits until the imports of these are complete.
        ("import safetensors.torch", ["imported safetensors", "imported torch", "imported safetensors.torch"]),
        ("import safetensors, safetensors_torch", [*IMPORTED, "imported safetensors_torch"]),
        (
            "import safetensors_torch, safetensors",
            ["imported torch", "imported safetensors_torch", "imported safetensors"],
        ),
    ],
)
def test_the_order_of_the_imports_does_not_matter(program: str, expected: list[str], site: Path) -> None:
    expected = [*expected, *(line for line in PATCHED if line not in expected)]
    assert run(site, program, "1") == (expected, "")


# A stub of safetensors whose functions return who opened the file.
OPENER = """
print("imported", __name__)
complete = True
class safe_open:
    def __init__(self, filename, framework, device="cpu"):
        print("the reference opens", filename, framework, device)
"""
PATCHING = (
    STUB
    + """
    class safe_open(safetensors.safe_open._safetensors_torch_waits_for):
        def __init__(self, filename, framework, device="cpu"):
            print("this library opens", filename, framework, device)
    safetensors.safe_open = safe_open
"""
)


def test_a_program_without_torch_stays_without_it(site: Path) -> None:
    add(site, "safetensors", OPENER)
    program = """
    import sys
    from safetensors import safe_open
    file = safe_open("a", framework="np")
    print(isinstance(file, safe_open), isinstance(3, safe_open), "torch" in sys.modules)
    """
    expected = ["imported safetensors", "the reference opens a np cpu", "True False False"]
    assert run(site, program, "1") == (expected, "")


def test_safe_open_for_torch_before_torch_is_imported(site: Path) -> None:
    add(site, "safetensors", OPENER)
    add(site, "safetensors_torch", PATCHING)
    program = """
    from safetensors import safe_open
    for framework in ("np", "pt", "pt", "np"):
        print(isinstance(safe_open("a", framework, device="meta"), safe_open))
    """
    opened = ["this library opens a pt meta", "True"]
    lines, errors = run(site, program, "1")
    assert errors == ""
    assert lines == [
        "imported safetensors",
        *("the reference opens a np meta", "True"),
        "imported torch",
        *PATCHED,
        *opened,
        *opened,
        *("this library opens a np meta", "True"),  # the real one leaves these to the reference
    ]
    # If the patch fails, the reference continues to work.
    add(site, "safetensors_torch", "raise ImportError('broken')")
    lines, errors = run(site, program, "1")
    assert lines[1::2] == [f"the reference opens a {framework} meta" for framework in ("np", "pt", "pt", "np")]
    assert errors.count("\n") == 1 and "ImportError: broken" in errors


def test_names_that_the_first_import_takes_are_ours(site: Path) -> None:
    add(site, "safetensors", "complete, safe_open = True, 'theirs'")
    source = "import sys; sys.modules['safetensors'].safe_open = 'ours'"
    add(site, "safetensors_torch", f"def patch_safetensors():\n    {source}")
    program = "import torch; from safetensors import safe_open; print(safe_open)"
    assert run(site, program, "1") == (["imported torch", "ours"], "")


def test_modules_that_are_imported_already_are_patched_at_once(site: Path) -> None:
    (site / "a_first.pth").write_text("import safetensors, torch\n")
    lines, errors = run(site, "print('the program')", "1")
    assert errors == ""
    assert lines == [*IMPORTED, *PATCHED, "the program"]


def test_looking_for_the_package_does_not_patch_it(site: Path) -> None:
    program = """
    import importlib.util
    spec = importlib.util.find_spec("safetensors")
    print(spec.origin.endswith("__init__.py"), spec.loader.is_package("safetensors"))
    print(importlib.util.find_spec("no_such_package"))
    """
    assert run(site, program, "1") == (["True True", "None"], "")
    assert run(site, program + IMPORT, "1")[0][2:] == [*IMPORTED, *PATCHED, "complete True"]


def test_two_start_files_patch_once(site: Path) -> None:
    shutil.copy(site / START_FILE, site / "again.pth")
    lines, _ = run(site, IMPORT + "; import sys; print([type(f).__name__ for f in sys.meta_path])", "1")
    assert lines.count("patched, complete: True") == 1
    assert "_Finder" not in lines[-1]
    (site / "a_first.pth").write_text("import safetensors, torch\n")
    assert run(site, "", "1")[0].count("patched, complete: True") == 1


def test_an_import_that_fails_is_patched_when_it_works(site: Path) -> None:
    add(site, "safetensors", "import os; complete = True; assert 'READY' in os.environ")
    program = """
    import os
    try:
        import safetensors
    except AssertionError:
        print("failed")
    os.environ["READY"] = "1"
    import safetensors
    """
    assert run(site, "import torch\n" + textwrap.dedent(program), "1") == (["imported torch", "failed", *PATCHED], "")


def test_without_safetensors_the_import_still_fails(site: Path) -> None:
    shutil.rmtree(site / "safetensors")
    program = """
    try:
        import safetensors
    except ModuleNotFoundError as error:
        print(error)
    """
    assert run(site, program, "1") == (["No module named 'safetensors'"], "")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('no torch here\\nand more of it')", "ImportError: no torch here"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def patch_safetensors(): raise OSError('broken')", "OSError: broken"),
        ("", "ImportError: cannot import name 'patch_safetensors'"),
    ],
)
def test_a_patch_that_fails_is_one_line(source: str, reason: str, site: Path) -> None:
    add(site, "safetensors_torch", source)
    lines, errors = run(site, IMPORT, "1")
    assert lines == [*IMPORTED, "complete True"]
    assert errors.startswith("safetensors_torch: SAFETENSORS_TORCH_PATCH=1, but safetensors stays as it is: ")
    assert reason in errors
    assert errors.count("\n") == 1 and errors.endswith("\n")


def test_the_package_was_removed(site: Path) -> None:
    shutil.rmtree(site / "safetensors_torch")
    lines, errors = run(site, IMPORT, "1")
    assert lines == [*IMPORTED, "complete True"]
    assert "No module named 'safetensors_torch'" in errors
    assert errors.count("\n") == 1


def test_another_value_is_one_line(site: Path) -> None:
    """It is printed once even with two start files, which a link to site-packages can cause."""
    shutil.copy(site / START_FILE, site / "again.pth")
    assert run(site, "import torch", "maybe") == (["imported torch"], "")
    lines, errors = run(site, IMPORT, "maybe")
    assert lines == [*IMPORTED, "complete True"]
    assert (
        errors == "safetensors_torch: SAFETENSORS_TORCH_PATCH='maybe' is neither 1 nor 0; safetensors stays as it is\n"
    )


def test_without_a_standard_error_nothing_is_printed(site: Path) -> None:
    add(site, "safetensors_torch", "raise ImportError")
    assert run(site, "import sys; sys.stderr = None\n" + IMPORT, "1")[0] == [*IMPORTED, "complete True"]


def test_both_files_are_recorded_so_that_pip_removes_them() -> None:
    recorded = {str(path) for path in files("safetensors-torch")}
    assert {START_FILE, f"{START_MODULE}.py"} <= recorded
    assert (SITE / START_FILE).is_file()


def test_the_packages_themselves(tmp_path: Path) -> None:
    """The program has only safetensors, which may be in another directory than this package."""
    paths = [str(SITE), str(Path(safetensors.__file__).parents[1])]
    program = f"""
    import sys
    sys.path[:0] = {paths!r}
    import numpy, safetensors.numpy
    from safetensors import safe_open
    path = {str(tmp_path / "file")!r}
    safetensors.numpy.save_file({{"a": numpy.ones(3)}}, path)
    with safe_open(path, "np") as file:
        print(file.get_tensor("a").tolist(), isinstance(file, safe_open), "torch" in sys.modules)
    with safe_open(path, "pt") as file:
        print(file.get_tensor("a").tolist(), [base.__module__ for base in type(file).__mro__])
    with safe_open(path, "np") as file:
        print(type(file) is safetensors._safetensors_rust.safe_open)
    import safetensors, safetensors_torch
    print(safe_open is safetensors.safe_open is safetensors.torch.safe_open)
    print(issubclass(safe_open, safetensors_torch.safe_open))
    print(issubclass(safetensors_torch.SafetensorError, safetensors.SafetensorError))
    safetensors_torch.unpatch_safetensors()
    print(safe_open is safetensors.safe_open is safetensors._safetensors_rust.safe_open)
    """
    lines, errors = run(None, program, "1")
    assert errors == ""
    assert lines == [
        "[1.0, 1.0, 1.0] True False",
        "[1.0, 1.0, 1.0] ['safetensors', 'safetensors_torch._safe_open', 'builtins']",
        *["True"] * 5,
    ]
