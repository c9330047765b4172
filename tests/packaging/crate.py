"""Packs the crate as `cargo publish` does, and uses the packed one: documentation, a Rust program, the C++ library.

Builds in a temporary directory, with the torch of this Python. Every change must be committed: cargo refuses others.

Run: python tests/packaging/crate.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from commands import run, timed

MANIFEST = """
[package]
name = "consumer"
version = "1.0.0"
edition = "2024"

[dependencies]
safetensors-torch = { path = "PATH" }
"""
PROGRAM = """
use safetensors_torch::{Backend, Dtype, Result, SaveOptions, TensorFile, TensorSpec, save_file};

fn main() -> Result<()> {
    let path = std::path::Path::new("consumer.safetensors");
    let spec = TensorSpec { name: "weight", dtype: Dtype::U8, shape: &[2, 3] };
    save_file(&[spec], &[&[1, 2, 3, 4, 5, 6]], None, path, SaveOptions::default())?;
    let file = TensorFile::open(path, Backend::Mmap)?;
    let memory = file.load_tensors(&[file.require("weight")?])?;
    // SAFETY: the buffer has the six bytes of the tensor, and lives as long as `memory`.
    let bytes = unsafe { std::slice::from_raw_parts(memory.start(0), 6) };
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6]);
    println!("{:?}", file.tensor(0)?.shape);
    Ok(())
}
"""
LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.ops.safetensors_torch.save_file({"weight": torch.ones(3)}, sys.argv[2])
assert torch.ops.safetensors_torch.load_file(sys.argv[2])["weight"].tolist() == [1, 1, 1]
"""
NEEDED = {"README.md", "LICENSE", "Cargo.toml", "Cargo.lock", "build.rs", "cpp/layer.cpp", "src/bridge.rs"}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="safetensors-torch-crate-") as name:
        directory = Path(name)
        # With that libtorch, every build of the C++ layer fails.
        environment = {**os.environ, "CARGO_TARGET_DIR": str(directory / "target"), "LIBTORCH": "/nonexistent"}
        with timed("cargo publish --dry-run: the packed crate builds without libtorch"):
            run("cargo", "publish", "--dry-run", "--locked", environment=environment)
        (crate,) = (path for path in (directory / "target/package").iterdir() if (path / "Cargo.toml").exists())
        crate = crate.rename(directory / crate.name)
        missing = {file for file in NEEDED if not (crate / file).exists()}
        assert not missing, missing

        with timed("cargo doc without libtorch, and without warnings"):
            command = ("cargo", "doc", "--no-deps", "--locked")
            run(*command, environment={**environment, "RUSTDOCFLAGS": "-D warnings"}, directory=crate)
        with timed("a Rust program that writes and reads a file"):
            consumer = directory / "consumer"
            (consumer / "src").mkdir(parents=True)
            (consumer / "Cargo.toml").write_text(MANIFEST.replace("PATH", str(crate)))
            (consumer / "src/main.rs").write_text(PROGRAM)
            assert run("cargo", "run", "--quiet", environment=environment, directory=consumer) == "[2, 3]\n"
        with timed("cargo build --features torch: a library that torch loads"):
            environment |= {"LIBTORCH_USE_PYTORCH": "1"}
            environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
            run("cargo", "build", "--features", "torch", "--locked", environment=environment, directory=crate)
            library = directory / "target/debug/libsafetensors_torch.so"
            run(sys.executable, "-c", LOAD, library, directory / "torch.safetensors")


if __name__ == "__main__":
    main()
