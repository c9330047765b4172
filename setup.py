"""Builds the Python package: the core with cargo, and the libtorch layer ahead of time if torch is installed.

Fills ``safetensors_torch/native`` of the wheel, or of the checkout for an editable install (``pip install -e .``).
``safetensors_torch/_native_build.py`` defines how the libtorch layer is compiled. The first import compiles it if none
was built for the installed torch.

SAFETENSORS_TORCH_AOT=0 leaves the libtorch layer to the first import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = "safetensors_torch"
# Outside of the package: the file that Python reads when it starts, and the module that it imports.
START_FILE = "safetensors_torch_patch.pth"
START_MODULE = "_safetensors_torch_start"
CRATE = "safetensors_torch"
TARGET = ROOT / "target" / "python"


def cargo_field(name: str) -> str | None:
    """Returns a text of the section [package] of Cargo.toml, which is also the package's."""
    section = (ROOT / "Cargo.toml").read_text(encoding="utf-8").partition("[package]")[2].partition("\n[")[0]
    found = re.search(rf'^{name}\s*=\s*"([^"]+)"', section, re.MULTILINE)
    return found and found.group(1)


def index_page(repository: str | None) -> str:
    """Returns README.md for the package index, where its relative links would lead nowhere.

    They become links into the repository, or plain text if there is none.
    """
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for mark, kind in ("!", "raw"), ("", "blob"):
        replacement = rf"{mark}[\1]({repository}/{kind}/HEAD/\2)" if repository else r"\1"
        page = re.sub(rf"{mark}\[([^]]+)\]\((?!https?:)([^)]+)\)", replacement, page)
    return page


def find_cargo() -> str:
    named = os.environ.get("CARGO") or shutil.which("cargo")
    usual = Path.home() / ".cargo" / "bin" / "cargo"
    if named or usual.exists():
        return named or str(usual)
    raise SystemExit("cargo is needed to build safetensors-torch from source. Install Rust with rustup")


class Core:
    """The output of cargo: the static and the shared library of the core, and the generated C++ half of the bridge."""

    def __init__(self) -> None:
        # Keeps paths of this machine out of the messages of panics and assertions.
        home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
        remap = [f"--remap-path-prefix={home}=cargo", f"--remap-path-prefix={ROOT}=safetensors-torch"]
        environment = dict(os.environ)
        if not re.search(r"\s", str(home)):  # the cc crate splits the variable at white space
            flags = [environment.get("CXXFLAGS"), f"-ffile-prefix-map={home}=cargo"]
            environment["CXXFLAGS"] = " ".join(filter(None, flags))
        command = [
            find_cargo(),
            "build",
            "--release",
            "--features=bridge",
            f"--target-dir={TARGET}",
            f"--config=build.rustflags={json.dumps(remap)}",
            "--message-format=json-render-diagnostics",
        ]
        result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=False)
        if result.returncode != 0:
            raise SystemExit(f"cargo failed with status {result.returncode}: {' '.join(command)}")
        messages = [json.loads(line) for line in result.stdout.splitlines() if line.startswith(b"{")]
        artifacts = [message for message in messages if message["reason"] == "compiler-artifact"]
        library = next(a for a in artifacts if a["target"]["name"] == CRATE and "staticlib" in a["target"]["kind"])
        script = next(
            message
            for message in messages
            if message["reason"] == "build-script-executed" and message["package_id"] == library["package_id"]
        )
        cxx = next(a for a in artifacts if a["target"]["name"] == "cxx" and "lib" in a["target"]["kind"])
        self.archive = next(Path(name) for name in library["filenames"] if name.endswith(".a"))
        self.library = next(Path(name) for name in library["filenames"] if name.endswith(".so"))
        self.bridge = Path(script["out_dir"]) / "cxxbridge"
        self.cxx = Path(cxx["target"]["src_path"]).parent.parent

    def stage(self, native: Path) -> None:
        """Fills ``native`` with the sources of the libtorch layer, which is compiled here and by C++ programs."""
        # Removes files of earlier builds, for another torch or from sources that no longer exist.
        if native.exists():
            shutil.rmtree(native)
        for source in (ROOT / "cpp").rglob("*"):
            if source.suffix in (".cpp", ".h"):
                copy(source, native / source.relative_to(ROOT))
        # C and C++ programs include this directory through the CMake package, so it contains the public headers only: a
        # program may have a cxx.h of its own.
        for header in (ROOT / "include").rglob("*.h*"):
            copy(header, native / "include" / header.relative_to(ROOT / "include"))
        for source in (ROOT / "cmake").glob("SafetensorsTorch*"):
            copy(source, native / "lib" / "cmake" / "SafetensorsTorch" / source.name)
        # Symbolic links, copied as files, without the headers of other packages.
        for header in ("rust/cxx.h", f"{CRATE.replace('_', '-')}/src/bridge.rs.h"):
            copy(self.bridge / "include" / header, native / "bridge" / "include" / header)
        generated = self.bridge / "sources" / CRATE.replace("_", "-") / "src" / "bridge.rs.cc"
        copy(generated, native / "bridge" / generated.name)
        # Compiled with the layer, instead of the copy in the archive, because its std::string must have torch's C++
        # ABI.
        copy(self.cxx / "src" / "cxx.cc", native / "bridge" / "cxx.cc")
        copy(self.cxx / "include" / "cxx.h", native / "bridge" / "include" / "cxx.h")
        archive = native / "lib" / "libsafetensors_torch_c.a"
        copy(self.archive, archive)
        strip = shutil.which(os.environ.get("STRIP", "strip"))
        if strip:
            subprocess.run([strip, "-g", str(archive)], check=True)
        # For the shell command, which does without torch.
        core = native / "lib" / "libsafetensors_torch_c.so"
        copy(self.library, core)
        if strip:
            subprocess.run([strip, str(core)], check=True)
        # The key of layers that are compiled at import. Written last: it marks the directory as complete.
        (native / "fingerprint").write_text(digest_of(native) + "\n", encoding="ascii")


def digest_of(directory: Path) -> str:
    """Returns a hash of all files below ``directory``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"\0{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


class BuildPackage(build_py):
    """Adds ``native`` to the package: in the build directory, or for an editable install in the checkout."""

    def native(self) -> Path:
        return (ROOT / "python" if self.editable_mode else Path(self.build_lib).resolve()) / PACKAGE / "native"

    def run(self) -> None:
        if not self.editable_mode:
            # Removes files of an earlier build, which would be packed too.
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()
        # Python reads .pth files in site-packages only, to which the root of build_lib is installed; for an editable
        # install, that of install_lib.
        install_lib = self.get_finalized_command("install").install_lib
        copy(ROOT / "python" / START_FILE, Path(install_lib if self.editable_mode else self.build_lib) / START_FILE)
        Core().stage(self.native())

    def built(self) -> dict[str, Path]:
        """Returns the files in ``native`` by their paths in a wheel."""
        place, native = Path(self.build_lib) / PACKAGE / "native", self.native()
        return {str(place / path.relative_to(native)): path for path in native.rglob("*") if path.is_file()}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        # For an editable install, get_output_mapping returns the files of native.
        added = [] if self.editable_mode else [str(Path(self.build_lib) / START_FILE), *self.built()]
        return [*super().get_outputs(include_bytecode), *added]

    def get_output_mapping(self) -> dict[str, str]:
        built = self.built() if self.editable_mode else {}
        return {**super().get_output_mapping(), **{place: str(path) for place, path in built.items()}}


class BinaryDistribution(Distribution):
    """A distribution that depends on the platform, even without an extension."""

    def has_ext_modules(self) -> bool:
        return True


class Wheel(bdist_wheel):
    """A wheel for one platform and every Python: nothing in it uses libpython."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def load_native_build() -> ModuleType:
    """Imports the package's _native_build by its path: the package cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location("_native_build", ROOT / "python" / PACKAGE / "_native_build.py")
    native_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native_build)
    return native_build


def ahead_of_time() -> dict:
    """Returns the arguments of setup() that compile the libtorch layer, or none if torch cannot be imported."""
    if os.environ.get("SAFETENSORS_TORCH_AOT", "").lower() in ("0", "false", "no", "off"):
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import TORCH_LIB_PATH, BuildExtension, CppExtension
    except ImportError:
        return {}
    native_build = load_native_build()

    class BuildLayer(BuildExtension):
        """Builds a plain shared library: without PyInit, libpython, and paths of this machine."""

        def __init__(self, *args, **kwargs) -> None:
            with native_build.ninja_on_path():  # torch looks for ninja here, and again when it compiles
                super().__init__(*args, **kwargs)

        def run(self) -> None:
            self.run_command("build_py")
            native = self.get_finalized_command("build_py").native()
            (extension,) = self.extensions
            extension.sources = native_build.sources(native)
            system = [flag for directory in extension.include_dirs for flag in ("-isystem", directory)]
            extension.include_dirs = native_build.include_dirs(native)
            # No debug information, which Python's own flags request, and no paths of this machine.
            headers = Path(TORCH_LIB_PATH).parent
            private = ["-g0", f"-ffile-prefix-map={native}=native", f"-ffile-prefix-map={headers}=torch"]
            # g++ resolves symbolic links in the names of headers.
            private.append(f"-ffile-prefix-map={headers.resolve()}=torch")
            extension.extra_compile_args = [*native_build.COMPILE_FLAGS, *private, *system]
            extension.extra_link_args = native_build.link_flags(native, self.library_name())
            extension.libraries = ["torch_cpu", "c10"]
            extension.library_dirs = [TORCH_LIB_PATH]
            extension.runtime_library_dirs = []
            with native_build.ninja_on_path():
                super().run()
            extension.sources = []  # an editable build would list absolute paths among the project's sources

        def build_extensions(self) -> None:
            # Some Pythons link extensions with a search path into their own directory.
            for name in ("linker_so", "linker_so_cxx"):
                command = getattr(self.compiler, name, None)
                if command:
                    setattr(self.compiler, name, [part for part in command if not part.startswith("-Wl,-rpath")])
            super().build_extensions()

        def library_name(self) -> str:
            return native_build.library_name(torch.__version__, torch.compiled_with_cxx11_abi())

        def get_ext_fullpath(self, fullname: str) -> str:
            return str(self.get_finalized_command("build_py").native() / "lib" / self.library_name())

        def copy_extensions_to_source(self) -> None:
            """Does nothing: build_py puts the library of an editable install into the checkout."""

        def get_output_mapping(self) -> dict[str, str]:
            return {}  # that of build_py contains the library

        def get_export_symbols(self, ext) -> list[str]:
            return []

    return {
        "ext_modules": [CppExtension(f"{PACKAGE}.native", [])],
        "cmdclass": {"build_ext": BuildLayer},
    }


if sys.platform != "linux":
    raise SystemExit("safetensors-torch supports Linux only")

layer = ahead_of_time()
repository = cargo_field("repository")
setup(
    version=cargo_field("version"),
    long_description=index_page(repository),
    long_description_content_type="text/markdown",
    project_urls={"Source": repository} if repository else {},
    license="Apache-2.0",
    packages=[PACKAGE, f"{PACKAGE}.cli", f"{PACKAGE}.distributed"],
    py_modules=[START_MODULE],
    package_dir={"": "python"},
    package_data={PACKAGE: ["py.typed"], f"{PACKAGE}.cli": ["page/*"]},
    ext_modules=layer.get("ext_modules", []),
    distclass=BinaryDistribution,
    cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel, **layer.get("cmdclass", {})},
)
