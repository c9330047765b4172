//! The format: bytes and their meaning. Opens no file.

pub(crate) mod byte_order;
pub mod dtype;
pub mod header;
pub(crate) mod json;
pub mod layout;
pub(crate) mod runs;
pub mod slice;
pub mod statistics;
pub(crate) mod strides;
