//! Builds the C++ half of the library.
//!
//! With feature `bridge`, generates the bridge between `src/bridge.rs` and `cpp/` into `OUT_DIR/cxxbridge`. With
//! feature `torch`, also finds libtorch, compiles `cpp/` against it and links it in. Nothing is downloaded.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The C library has a name of its own, so that no C++ program loads it by mistake. Only the major version, because a
    // program runs with every library of the same major version. cargo-c uses the same soname, from
    // [package.metadata.capi.library] in Cargo.toml.
    let name = if cfg!(feature = "torch") { "safetensors_torch" } else { "safetensors_torch_c" };
    let major = std::env::var("CARGO_PKG_VERSION_MAJOR").unwrap_or_default();
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,lib{name}.so.{major}");
    // dlclose must not unload the library: its threads may be running, and its operators are registered with torch.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    #[cfg(feature = "bridge")]
    bridge::build();
}

#[cfg(feature = "bridge")]
mod bridge {
    /// Generates the bridge, and compiles it with `cpp/` if the feature `torch` is enabled.
    pub fn build() {
        println!("cargo:rerun-if-changed=src/bridge.rs");
        #[cfg_attr(not(feature = "torch"), expect(unused_mut, unused_variables))]
        let mut build = cxx_build::bridge("src/bridge.rs");
        #[cfg(feature = "torch")]
        super::torch::compile(&mut build);
    }
}

#[cfg(feature = "torch")]
mod torch {
    use std::collections::BTreeSet;
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// The archive of `cpp/` and the bridge.
    const ARCHIVE: &str = "safetensors_torch_cpp";

    /// The directory of libtorch, and how it was compiled.
    struct LibTorch {
        include: PathBuf,
        lib: PathBuf,
        cxx11_abi: String,
    }

    /// A Python script that prints the directory and the ABI of its torch.
    const ASK_PYTHON: &str = "import os, torch; print(os.path.dirname(torch.__file__)); \
                              print(int(torch._C._GLIBCXX_USE_CXX11_ABI))";

    /// Compiles `cpp/`, and links all of its objects and libtorch.
    pub fn compile(build: &mut cc::Build) {
        println!("cargo:rerun-if-changed=cpp");
        let torch = find();
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let cxx_header =
            PathBuf::from(env::var_os("DEP_CXXBRIDGE1_HEADER").expect("the crate cxx names its header"));
        let cxx = cxx_header.ancestors().nth(2).expect("cxx.h is in include/ of the crate cxx");
        build
            .file("cpp/layer.cpp")
            .file(hide_bridge(&out, cxx))
            // Instead of the copy in the crate cxx, because its std::string must have torch's C++ ABI.
            .file(cxx.join("src/cxx.cc"))
            .include(".")
            .std(standard(&torch.include))
            .flag("-fvisibility=hidden")
            .flag("-fvisibility-inlines-hidden")
            .warnings(true)
            .extra_warnings(true)
            // g++ 12 reports false overflows in torch's headers.
            .flag_if_supported("-Wno-stringop-overflow")
            .flag("-isystem")
            .flag(&torch.include)
            .flag("-isystem")
            .flag(torch.include.join("torch/csrc/api/include"))
            .define("_GLIBCXX_USE_CXX11_ABI", torch.cxx11_abi.as_str())
            // Keeps paths of this machine out of assertions.
            .flag_if_supported(format!("-ffile-prefix-map={}=torch", torch.include.display()))
            // g++ resolves symbolic links in the names of headers.
            .flag_if_supported(format!("-ffile-prefix-map={}=torch", canonical(&torch.include).display()))
            .flag_if_supported(format!("-ffile-prefix-map={}=cxx", cxx.display()))
            .flag_if_supported(format!("-ffile-prefix-map={}=bridge", out.display()))
            .cargo_metadata(false)
            .compile(ARCHIVE);
        // No symbol refers to the objects that register the ops, so the linker would drop them.
        println!("cargo:rustc-link-search=native={}", out.display());
        println!("cargo:rustc-link-lib=static:+whole-archive={ARCHIVE}");
        println!("cargo:rustc-link-search=native={}", torch.lib.display());
        for library in ["torch_cpu", "c10"] {
            println!("cargo:rustc-link-lib=dylib={library}");
        }
        println!("cargo:rustc-link-lib=dylib=stdc++");
        // For this crate's tests only: the library contains no path of this machine. The published crate has no tests, and
        // cargo refuses this without one.
        if Path::new("tests").exists() {
            println!("cargo:rustc-link-arg-tests=-Wl,-rpath,{}", torch.lib.display());
        }
    }

    /// Returns the C++ standard that torch's headers require, which is C++20 since torch 2.14. The compiler reports
    /// missing headers.
    fn standard(include: &Path) -> &'static str {
        let header = std::fs::read_to_string(include.join("ATen/ATen.h")).unwrap_or_default();
        if header.contains("error C++20") { "c++20" } else { "c++17" }
    }

    /// Writes a C++ file that names every symbol of the bridge as hidden, and returns its path.
    ///
    /// rustc exports the Rust half of the bridge from a cdylib, where it could clash with another library that uses
    /// cxx. The linker uses the strictest visibility that any object declares for a symbol, so this object hides them
    /// all.
    fn hide_bridge(out: &Path, cxx: &Path) -> PathBuf {
        let bridge = out.join("cxxbridge/sources/safetensors-torch/src/bridge.rs.cc");
        let mut text = std::fs::read_to_string(bridge).expect("cxx-build has generated the bridge");
        // Expanded, since macros make the names in it.
        let expanded = cc::Build::new().cpp(true).std("c++17").file(cxx.join("src/cxx.cc")).expand();
        text.push_str(&String::from_utf8_lossy(&expanded));
        let symbols: BTreeSet<&str> = text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '$'))
            .filter(|word| word.contains("cxxbridge1$"))
            .collect();
        let mut source = String::from("extern \"C\" {\n");
        for symbol in &symbols {
            // Weak: symbols that are not defined are not an error.
            source +=
                &format!("__attribute__((visibility(\"hidden\"), weak)) extern const char {symbol}[];\n");
        }
        let list: Vec<&str> = symbols.into_iter().collect();
        source += &format!(
            "}}\n__attribute__((used)) static const char* const symbols[] = {{\n{}}};\n",
            list.join(",\n")
        );
        let path = out.join("hide_bridge.cc");
        std::fs::write(&path, source).expect("OUT_DIR can be written");
        path
    }

    /// Finds libtorch by the environment variables that tch-rs uses, or by the first Python that has torch.
    fn find() -> LibTorch {
        for name in
            ["LIBTORCH", "LIBTORCH_INCLUDE", "LIBTORCH_LIB", "LIBTORCH_USE_PYTORCH", "LIBTORCH_CXX11_ABI"]
        {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let root = env::var_os("LIBTORCH").map(PathBuf::from);
        let include = env::var_os("LIBTORCH_INCLUDE").map(PathBuf::from).or_else(|| root.clone());
        let lib = env::var_os("LIBTORCH_LIB").map(PathBuf::from).or(root);
        let abi = env::var("LIBTORCH_CXX11_ABI").ok();
        let prefer_python = env::var("LIBTORCH_USE_PYTORCH").is_ok_and(|value| value != "0");
        if let (Some(include), Some(lib), false) = (include, lib, prefer_python) {
            return check(LibTorch {
                include: include.join("include"),
                // CMake names the directory of the libraries, because some systems do not call it lib.
                lib: if lib.join("libtorch_cpu.so").exists() { lib } else { lib.join("lib") },
                cxx11_abi: abi.unwrap_or_else(|| "1".into()),
            });
        }
        let candidates = [".venv/bin/python", "python3", "python"];
        for python in candidates {
            if let Some((directory, python_abi)) = ask(python) {
                println!("cargo:rerun-if-changed={}", directory.join("version.py").display());
                return check(LibTorch {
                    include: directory.join("include"),
                    lib: directory.join("lib"),
                    cxx11_abi: abi.unwrap_or(python_abi),
                });
            }
        }
        fail(format_args!(
            "libtorch was not found; set LIBTORCH to its directory (the one with include/ and lib/), or have a Python with \
             torch on PATH or in .venv, or build the C library alone, without the feature torch. Asked: {candidates:?}"
        ))
    }

    /// Returns the directory of the torch that `python` imports, and its ABI.
    fn ask(python: &str) -> Option<(PathBuf, String)> {
        // Command resolves a relative path from its own current directory.
        let local = Path::new(python);
        let program =
            if local.components().count() > 1 { env::current_dir().ok()?.join(local) } else { local.into() };
        let output = Command::new(program).args(["-c", ASK_PYTHON]).output().ok()?;
        let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
        let mut lines = text.lines();
        Some((PathBuf::from(lines.next()?), lines.next()?.to_string()))
    }

    /// Returns the path without symbolic links.
    fn canonical(path: &Path) -> PathBuf {
        path.canonicalize().unwrap_or_else(|error| fail(format_args!("{}: {error}", path.display())))
    }

    /// Fails if headers or libraries are missing.
    fn check(torch: LibTorch) -> LibTorch {
        for file in [
            torch.include.join("torch/library.h"),
            torch.lib.join("libtorch_cpu.so"),
            torch.lib.join("libc10.so"),
        ] {
            if !file.exists() {
                fail(format_args!(
                    "{} is missing; set LIBTORCH to a libtorch directory (the one with include/ and lib/)",
                    file.display()
                ));
            }
        }
        torch
    }

    /// Ends the build with an error of cargo, without a backtrace.
    fn fail(message: std::fmt::Arguments) -> ! {
        println!("cargo::error={message}");
        std::process::exit(1)
    }
}
