//! Writes tensors from memory to files.

pub mod atomic;
mod direct;
pub mod edit;
pub mod incremental;
pub(crate) mod joined;
mod mapped;
pub(crate) mod output;
pub mod save;
mod target;
mod vectored;
mod write_back;
