//! The bodies of the fuzz targets, one module each: bytes in, a panic where something is wrong.
//!
//! Shared by the programs that libFuzzer drives (`fuzz_targets/`) and by the test that replays the corpus
//! (`tests/replay.rs`). `json`, `model` and `frame` are what several targets judge by; they use nothing of the core
//! but the list of dtypes. `directory` is where they have files, `tensors` makes what they write.

#[cfg(not(fuzzing))]
compile_error!(
    "the core gives its innards to fuzz targets only with RUSTFLAGS=\"--cfg fuzzing\": see README.md"
);

pub mod capi;
pub mod differential;
mod directory;
pub mod edit;
mod frame;
pub mod header;
pub mod incremental_writer;
pub mod index;
mod json;
mod model;
pub mod slice;
mod tensors;
pub mod writer;

/// What a target does with an input.
pub type Body = fn(&[u8]);

/// Every target, by the name of its program and of its corpus.
pub const TARGETS: &[(&str, Body)] = &[
    ("capi", capi::run),
    ("differential", differential::run),
    ("edit", edit::run),
    ("header", header::run),
    ("incremental_writer", incremental_writer::run),
    ("index", index::run),
    ("slice", slice::run),
    ("writer", writer::run),
];
