//! Where a file of tensors is saved to: a file that is put in place at the end, or a pipe, a device or a descriptor.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::atomic::AtomicFile;
use super::direct::Direct;
use super::target::Target;
use crate::error::{Error, Result};
use crate::sys::directory::open_parent;

/// A save that is under way.
#[derive(Debug)]
pub(crate) enum Output {
    Atomic(AtomicFile),
    Direct(Direct),
}

impl Output {
    /// Begins a save of exactly `length` bytes to `path`, as [`AtomicFile::create`] does, or to the pipe, the character
    /// device or the descriptor of this process that is there, perhaps behind a symbolic link. A pipe without a reader is
    /// not waited for yet.
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

    /// Appends `pieces`, or, if a pipe does not take all of them before `until`, a part; returns how many bytes. A file
    /// takes all of them.
    pub(crate) fn write_until<'a>(
        &mut self,
        pieces: impl Iterator<Item = &'a [u8]>,
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

    /// Puts a file in place, as [`AtomicFile::commit`] does. With `durable`, returns once the bytes are on the disk.
    pub(crate) fn commit(self, durable: bool) -> Result<()> {
        match self {
            Output::Direct(direct) => direct.commit(durable),
            Output::Atomic(file) => file.commit(durable),
        }
    }
}
