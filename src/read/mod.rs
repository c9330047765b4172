//! From a file into memory.

mod byte_ranges;
pub mod caller_source;
mod copy_runs;
pub mod explain;
pub mod external;
pub mod file;
#[cfg_attr(not(feature = "bridge"), allow(dead_code, reason = "only C++ reads in steps"))]
pub(crate) mod joint_read;
pub mod prefault;
pub mod prefetch;
pub mod prefetch_loader;
pub mod prefetch_plan;
pub mod prefetch_schedule;
mod read_ahead;
pub(crate) mod reader;
pub mod slab_layout;
mod slice_reader;
pub mod source;
pub mod statistics;
pub(crate) mod strategy;
mod strided_read;
mod vectored;
