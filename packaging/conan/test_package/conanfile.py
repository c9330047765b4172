"""Builds and runs the programs of tests/install/consumer with CMake, and the one in C with pkg-config too."""

import os

from conan import ConanFile
from conan.tools.build import can_run
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout


class TestPackage(ConanFile):
    settings = "os", "arch", "compiler", "build_type"
    generators = "PkgConfigDeps", "VirtualRunEnv"

    def requirements(self):
        self.requires(self.tested_reference_str)

    def layout(self):
        cmake_layout(self)

    @property
    def _consumer(self):
        return os.path.join(self.source_folder, "..", "..", "..", "tests", "install", "consumer")

    def _with_torch(self):
        return bool(self.dependencies["safetensors-torch"].options.libtorch)

    def generate(self):
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables["CONSUMER_COMPONENTS"] = "c;cpp" if self._with_torch() else "c"
        toolchain.generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure(build_script_folder=self._consumer)
        cmake.build()
        flags = f'$(PKG_CONFIG_PATH="{self.generators_folder}" pkg-config --cflags --libs safetensors_torch-c)'
        self.run(f'cc -std=c11 "{self._consumer}/use_c.c" {flags} -o pkg_c')

    def test(self):
        if can_run(self):
            for program in ["use_c", "pkg_c"] + ["use_cpp"] * self._with_torch():
                self.run(f"./{program} {program}.safetensors", env="conanrun")
