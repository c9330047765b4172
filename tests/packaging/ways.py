"""The ways to install from source: the sdist, from it with build isolation, and editable, each in a new environment.

Owns the environments and the checks of their files; check.py checks the package. Builds the core once and the libtorch
layer twice, in a temporary directory. The environments link to the torch of another Python, so that nothing large is
downloaded. pip fetches setuptools and wheel from its index.

Run: python tests/packaging/ways.py [--torch-of PYTHON]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from commands import run

HERE = Path(__file__).resolve().parent
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
# These of the other Python stay where they are: they are not what is tested, or what the build is to find by itself.
LEFT_OUT = (
    "safetensors_torch",
    "pip",
    "setuptools",
    "wheel",
    "_distutils_hack",
    "distutils-precedence",
    "__editable__",
)


def make_sdist(python: str, directory: Path) -> Path:
    """Returns the unpacked sdist."""
    (directory / "egg").mkdir()
    environment = {**os.environ, "SAFETENSORS_TORCH_AOT": "0"}
    command = (
        python,
        "setup.py",
        "-q",
        "egg_info",
        f"--egg-base={directory / 'egg'}",
        "sdist",
        f"--dist-dir={directory}",
    )
    run(*command, environment=environment)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(directory / "sdist", filter="data")
    (tree,) = (directory / "sdist").iterdir()
    return tree


class Environment:
    """Creates a virtual environment with links to the packages of the Python with torch, and a cache of its own."""

    def __init__(self, python: str, directory: Path, *also: str) -> None:
        self.directory = directory
        run(python, "-m", "venv", directory)
        self.python = directory / "bin" / "python"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        other, own = (Path(run(one, "-c", ask).strip()) for one in (python, self.python))
        for path in other.iterdir():
            left_out = path.name.startswith(LEFT_OUT) and not path.name.startswith(also or ("/",))
            if not left_out and not (own / path.name).exists():
                (own / path.name).symlink_to(path)
        self.site = own
        self.variables = {**os.environ, "SAFETENSORS_TORCH_CACHE": str(directory.parent / "cache")}
        # What builds and compiles with this Python finds its tools by PATH.
        self.variables["PATH"] = (
            f"{directory / 'bin'}{os.pathsep}{os.path.dirname(python)}{os.pathsep}{os.environ['PATH']}"
        )

    def install(self, *arguments: str | Path) -> None:
        run(self.python, *PIP, *arguments, environment=self.variables, directory=self.directory)

    def check(self) -> dict:
        return json.loads(
            run(self.python, "-I", HERE / "check.py", environment=self.variables, directory=self.directory)
        )


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"not so: {what}")
    print(f"ok: {what}", flush=True)


def layers(native: str | Path) -> list[str]:
    return [path.name for path in Path(native).glob("lib/*-torch*.so")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-of", default=sys.executable, help="a Python that has torch, safetensors and numpy")
    python = os.path.abspath(parser.parse_args().torch_of)
    with tempfile.TemporaryDirectory(prefix="safetensors-torch-ways-") as name:
        directory = Path(name)
        tree = make_sdist(python, directory)
        expect(
            (tree / "LICENSE").exists() and (tree / "docs").is_dir() and (tree / "tests").is_dir(), "the sdist is whole"
        )

        plain = Environment(python, directory / "plain")
        plain.install(tree)
        said = plain.check()
        expect(Path(said["package"]).is_relative_to(plain.site), "pip install . from the sdist, with build isolation")
        expect(layers(said["native"]) == [], "  where the build saw no torch: compiled at the first import")
        expect(said["compiler_s"] > 1, "  which was this one")

        editable = Environment(
            python, directory / "editable", "setuptools", "wheel", "_distutils_hack", "distutils-precedence"
        )
        editable.install("-e", tree)
        said = editable.check()
        native = tree / "python" / "safetensors_torch" / "native"
        expect(
            Path(said["package"]).is_relative_to(tree), "pip install -e ., with build isolation: runs from the sources"
        )
        expect(said["compiler_s"] < 1, "  with the same layer as the plain install, out of the cache")
        expect((editable.site / "safetensors_torch_patch.pth").exists(), "  with the file that Python reads first")
        before = (native / "fingerprint").read_text()
        with open(tree / "cpp" / "layer.cpp", "a", encoding="utf-8") as source:
            source.write("// A change.\n")
        editable.install("-e", tree)
        expect((native / "fingerprint").read_text() != before, "  once more: a change of a source is taken over")

        editable.install("--no-build-isolation", "-e", tree)
        said = editable.check()
        expect(Path(said["package"]).is_relative_to(tree), "pip install --no-build-isolation -e .")
        expect(len(layers(native)) == 1 and said["compiler_s"] < 1, "  with a layer for the torch that is installed")

        editable.install(tree)
        said = editable.check()
        expect(Path(said["package"]).is_relative_to(editable.site), "pip install . after it, which takes its place")
        expect(layers(said["native"]) == [], "  and nothing of what the editable install built")


if __name__ == "__main__":
    main()
