//! The machine: memory, pages, threads, directories, signals. Knows nothing about the format.

pub mod buffers;
pub(crate) mod copy;
pub mod direct_io;
pub(crate) mod directory;
pub(crate) mod filesystem;
pub(crate) mod fork;
pub(crate) mod huge_pages;
pub(crate) mod memory_limit;
pub(crate) mod mutex;
pub(crate) mod page_cache;
pub(crate) mod parallel;
pub mod raw_bytes;
pub(crate) mod signals;
pub mod threads;
pub(crate) mod workers;
