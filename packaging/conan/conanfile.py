"""Conan recipe of the C library, and of the C++ library beside it if the option `libtorch` names a libtorch.

Run: conan create packaging/conan [-o "&:libtorch=DIR"]

Needs make, cargo and a C compiler, and for C++ a C++ compiler. cargo's configuration says where it gets the crates.
"""

import os
import re
import sys

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.files import copy, load

SOURCES = ("src/*", "cpp/*", "include/*", "cmake/*", "pkgconfig/*", "packaging/licenses.py", "Makefile", "LICENSE")
CRATE = ("Cargo.toml", "Cargo.lock", "build.rs", "README.md")


class SafetensorsTorch(ConanFile):
    name = "safetensors-torch"
    description = "safetensors files in C, and in C++ with LibTorch"
    license = "Apache-2.0"
    topics = ("safetensors", "torch", "libtorch", "tensor")
    package_type = "shared-library"
    settings = "os", "arch", "compiler", "build_type"
    # The directory with include/ and lib/ of a libtorch.
    options = {"libtorch": [None, "ANY"]}
    default_options = {"libtorch": None}

    @property
    def _checkout(self):
        return os.path.join(self.recipe_folder, "..", "..")

    def set_version(self):
        manifest = load(self, os.path.join(self._checkout, "Cargo.toml"))
        self.version = re.search(r'^version = "(.*)"', manifest, re.MULTILINE)[1]

    def export_sources(self):
        for pattern in SOURCES + CRATE:
            copy(self, pattern, self._checkout, self.export_sources_folder)

    def validate(self):
        if self.settings.os != "Linux":
            raise ConanInvalidConfiguration(f"{self.settings.os}: not supported; build for Linux")

    def package_id(self):
        # cargo always builds for release, and any compiler links a C library.
        del self.info.settings.build_type
        if not self.info.options.libtorch:
            del self.info.settings.compiler

    def _stage(self):
        return os.path.join(self.build_folder, "stage")

    def build(self):
        torch = f'LIBTORCH="{self.options.libtorch}"' if self.options.libtorch else "TORCH=0"
        self.run(f'make install {torch} DESTDIR="{self._stage()}" PREFIX=')
        features = "--features bridge" if self.options.libtorch else ""
        licenses = os.path.join(self._stage(), "licenses")
        os.mkdir(licenses)
        self.run(f'"{sys.executable}" packaging/licenses.py {features} >"{licenses}/crates"')

    def package(self):
        # The installed files contain no path, so they can be moved.
        copy(self, "*", self._stage(), self.package_folder)
        copy(self, "LICENSE", self.build_folder, os.path.join(self.package_folder, "licenses"))

    def package_info(self):
        c = self.cpp_info.components["c"]
        c.libs = ["safetensors_torch_c"]
        c.builddirs = [os.path.join("lib", "cmake", "SafetensorsTorch")]
        c.set_property("pkg_config_name", "safetensors_torch-c")
        # CMake uses the package that `make install` installs.
        self.cpp_info.set_property("cmake_find_mode", "none")
        if self.options.libtorch:
            torch = str(self.options.libtorch)
            cpp = self.cpp_info.components["cpp"]
            cpp.libs = ["safetensors_torch", "torch_cpu", "c10"]
            cpp.includedirs = ["include", f"{torch}/include", f"{torch}/include/torch/csrc/api/include"]
            cpp.libdirs = ["lib", f"{torch}/lib"]
            # The CMake package finds libtorch there.
            cpp.builddirs = [torch]
            cpp.set_property("pkg_config_name", "safetensors_torch")
