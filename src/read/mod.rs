//! From a file into memory.

pub mod explain;
pub mod file;
pub mod prefault;
pub mod prefetch;
pub mod prefetch_loader;
pub mod prefetch_plan;
mod read_ahead;
pub(crate) mod reader;
pub mod slab_layout;
mod slice_reader;
pub mod source;
pub(crate) mod strategy;
