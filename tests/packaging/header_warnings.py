"""Compiles the public header and the programs of tests/guesses with each compiler and C++ standard, without warnings.

Compilers that are not installed are skipped. Also checks the texts of programs that must not compile.

Run: python tests/packaging/header_warnings.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from commands import ROOT, run, timed

# C++23 is c++2b for these compilers.
STANDARDS = "c++17", "c++20", "c++2b"
WARNINGS = "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"
# What must not compile, and a part of the compiler's error.
MISTAKES = {
    'safetensors_torch::load("model.safetensors")': "for the path of a file, call load_file",
    'safetensors_torch::load(std::filesystem::path("model.safetensors"))': "for the path of a file, call load_file",
    'safetensors_torch::load_file("model.safetensors", 0)': "use of deleted function",
}


def torch_flags() -> list[str]:
    torch = Path(sysconfig.get_path("platlib")) / "torch/include"
    return [f"-I{ROOT / 'include'}", f"-isystem{torch}", f"-isystem{torch / 'torch/csrc/api/include'}"]


def check_mistakes(flags: list[str], source: Path) -> None:
    for code, text in MISTAKES.items():
        source.write_text(f"#include <safetensors_torch.hpp>\nint main() {{ {code}; }}\n", encoding="utf-8")
        command = ["g++", "-std=c++17", "-fsyntax-only", *flags, str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0 or text not in result.stderr:
            raise SystemExit(f"{code}: expected a compiler error with {text!r}, got {result.stderr or 'none'}")


def main() -> None:
    flags = torch_flags()
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "all.cpp"
        guesses = sorted((ROOT / "tests/guesses/cpp").glob("*.cpp"))
        program = run(sys.executable, "tests/one_program.py", *guesses)
        # No guess has a compiled model.
        source.write_text(f"#include <safetensors_torch/aoti.hpp>\n{program}", encoding="utf-8")
        for compiler in "g++", "clang++", "clang++-14":
            if shutil.which(compiler) is None:
                print(f"skipped: {compiler} is not installed")
                continue
            for standard in STANDARDS:
                with timed(f"{compiler} -std={standard}: no warnings"):
                    run(compiler, f"-std={standard}", "-fsyntax-only", *WARNINGS, *flags, source)
        with timed("errors of programs that must not compile"):
            check_mistakes(flags, source)


if __name__ == "__main__":
    main()
