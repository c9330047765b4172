//! The output of a save: a file that is replaced at the end, or a pipe, a device or a descriptor.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::atomic::AtomicFile;
use super::direct::Direct;
use super::target::Target;
use crate::error::{Error, Result};
use crate::sys::directory::open_parent;
use crate::sys::raw_bytes::RawBytes;

#[derive(Debug)]
pub(crate) enum Output {
    Atomic(AtomicFile),
    Direct(Direct),
}

impl Output {
    /// Starts a save of exactly `length` bytes to `path`: as [`AtomicFile::create`] does, or to a pipe, a character device
    /// or a descriptor, perhaps behind a symbolic link. Does not wait for a pipe's reader.
    pub(crate) fn create(path: &Path, length: u64) -> Result<Output> {
        let (directory, name) = open_parent(path, "create")?;
        match Target::find(&directory, &name).map_err(|source| Error::io("create", path, source))? {
            Target::Special(entry) => Ok(Output::Direct(Direct::special(path, directory, name, entry))),
            Target::Descriptor(number) => Direct::descriptor(path, number).map(Output::Direct),
            Target::Replaced | Target::Foreign | Target::Refused(_) => {
                AtomicFile::create_in(Arc::new(directory), name, path, length).map(Output::Atomic)
            }
        }
    }

    /// Appends `pieces`; returns the number of bytes, which is smaller only if a pipe is full until `until`.
    pub(crate) fn write_until<'a>(
        &mut self,
        pieces: impl Iterator<Item = RawBytes<'a>>,
        until: Option<Instant>,
    ) -> Result<u64> {
        match self {
            Output::Direct(direct) => direct.write(pieces, until),
            Output::Atomic(file) => {
                let mut written = 0;
                file.write(pieces.inspect(|piece| written += piece.len() as u64))?;
                Ok(written)
            }
        }
    }

    /// Ends the save, as [`AtomicFile::commit`] does. With `durable`, returns once the bytes are on the disk.
    pub(crate) fn commit(self, durable: bool) -> Result<()> {
        match self {
            Output::Direct(direct) => direct.commit(durable),
            Output::Atomic(file) => file.commit(durable),
        }
    }
}
