//! From a file into memory.

pub mod file;
pub mod prefault;
pub mod prefetch;
pub(crate) mod reader;
pub mod source;
