//! The C ABI that `include/safetensors_torch.h` declares: one module for each C object.
//!
//! Turns C arguments into calls of the core, and results into numbers. No decision about the format is made here.
//! What each function does, owns and refuses is written in the header, once; the names here are the names there.
//!
//! # Safety
//!
//! Every function trusts its caller in what the header asks for: a handle comes from this library and was not freed, a
//! pointer with a length is valid for so many elements, a string without a length ends in NUL. What can be checked is
//! checked: NULL, alignment, UTF-8, sizes. All casts of pointers are in `pointer`.

// The header states every function's contract; the part that is the caller's is the module's `Safety`, above.
#![allow(clippy::missing_safety_doc)]
// The types are called what C calls them.
#![allow(non_camel_case_types)]

mod checkpoint;
mod dtype;
mod file;
mod incremental_writer;
mod metadata;
mod options;
mod pointer;
mod slice;
mod status;
mod threads;
mod writer;

pub use checkpoint::*;
pub use dtype::*;
pub use file::*;
pub use incremental_writer::*;
pub use metadata::*;
pub use options::*;
pub use slice::*;
pub use status::*;
pub use threads::*;
pub use writer::*;

use std::ffi::c_char;

/// The body of every C function: no panic passes it.
///
/// `boundary!({ ... })` takes a body that gives `Result<()>`, and is the status; an error, or a panic, becomes the
/// thread's last error. `boundary!(fallback; { ... })` is the body's value, or `fallback` after a panic.
macro_rules! boundary {
    ($body:block) => {
        $crate::capi::status::guard(|| $body)
    };
    ($fallback:expr; $body:block) => {
        $crate::capi::status::guard_value($fallback, || $body)
    };
}
use boundary;

/// The version of the library, as in `Cargo.toml`.
#[unsafe(no_mangle)]
pub extern "C" fn sft_get_version() -> *const c_char {
    boundary!(c"".as_ptr(); { concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast() })
}
