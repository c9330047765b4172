//! The fuzz targets, one module each: functions of bytes that panic if a property does not hold.
//!
//! The programs of libFuzzer (`fuzz_targets/`) and the test that replays the corpus (`tests/replay.rs`) share them.
//! `json`, `model` and `frame` compute expected results; from the core, they use only the list of dtypes. `directory`
//! contains files, and `tensors` generates tensors to write.

#[cfg(not(fuzzing))]
compile_error!("fuzz targets need the internals of the core: set RUSTFLAGS=\"--cfg fuzzing\"; see README.md");

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

/// The function that runs a target on an input.
pub type Body = fn(&[u8]);

/// All targets, by the name of program and corpus.
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
