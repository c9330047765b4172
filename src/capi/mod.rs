//! The C ABI that `include/safetensors_torch.h` declares: one module for each C object.
//!
//! Each function converts its arguments, calls the core, and converts the result. The header documents each function
//! once; names here are the names there.
//!
//! # Safety
//!
//! The header's contract has four clauses that the caller must keep, because nobody can check them here. Each `SAFETY`
//! comment of this module names the ones it relies on:
//!
//! - "Pointers": a pointer is valid for its length, or for one element, during the call.
//! - "Ownership": a handle came from this library and has not been freed; borrowed bytes stay valid and unchanged.
//! - "Threads": no other thread uses a handle that is not const, or frees a handle in use.
//! - "Text": a string without a length ends in NUL.
//!
//! Everything else is checked: NULL, alignment, lengths, UTF-8. All casts of pointers are in `pointer`.

// The header documents every public item; the part of a contract that the caller must keep is above.
#![allow(missing_docs, clippy::missing_safety_doc)]
// The types have their C names.
#![allow(non_camel_case_types)]

mod boundary;
mod checkpoint;
mod dtype;
mod file;
mod handle;
mod incremental_writer;
mod joined_file;
mod library;
mod metadata;
mod options;
mod pointer;
mod prefetch;
mod slice;
mod source;
mod statistics;
mod status;
mod types;
mod writer;

pub use boundary::{sft_last_error_get_message, sft_last_error_get_os_error};
pub use checkpoint::*;
pub use dtype::*;
pub use file::*;
pub use handle::*;
pub use incremental_writer::*;
pub use joined_file::*;
pub use library::*;
pub use metadata::*;
pub use options::*;
pub use prefetch::*;
pub use slice::*;
pub use source::*;
pub use statistics::*;
pub use status::*;
pub use types::*;
pub use writer::*;
