//! The right to write a tensor, and the writer that appends to one.

use std::ops::Range;
use std::sync::Arc;

use super::state::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::raw_bytes::RawBytes;
use crate::write::atomic::AtomicFile;

/// An exclusive right to write some bytes of a tensor, until it is dropped. The bytes count as written once it is kept.
#[derive(Debug)]
pub(super) struct Claim {
    shared: Arc<Shared>,
    /// `None` only during the drop.
    file: Option<Arc<AtomicFile>>,
    index: usize,
    bytes: Range<u64>,
    is_kept: bool,
}

impl Claim {
    pub(super) fn new(shared: &Arc<Shared>, index: usize, bytes: Range<u64>) -> Result<Claim> {
        let tensor = &shared.tensors[index];
        let mut state = shared.lock()?;
        let file = state.file.clone().ok_or_else(|| shared.closed())?;
        let written = &mut state.written[index];
        let is_free = if tensor.nbytes == 0 {
            !std::mem::replace(&mut written.is_written, true)
        } else {
            written.bytes.insert(bytes.clone())
        };
        if !is_free {
            let what = if bytes == (0..tensor.nbytes) {
                String::new()
            } else {
                format!(" in part: bytes {} to {}", bytes.start, bytes.end)
            };
            let detail = format!("tensor {:?} was written already{what}; give each once", tensor.name);
            return Err(shared.fail(ErrorKind::Duplicate, detail));
        }
        written.writers += 1;
        Ok(Claim { shared: Arc::clone(shared), file: Some(file), index, bytes, is_kept: false })
    }

    /// Writes at `offset` of the tensor, within the claimed bytes.
    pub(super) fn write(&self, offset: u64, bytes: RawBytes<'_>) -> Result<()> {
        let file = self.file.as_ref().expect("there until the claim is dropped");
        file.write_at(bytes, self.shared.tensors[self.index].begin + offset)
    }

    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // In another process nothing can be written any more.
        let Ok(mut state) = self.shared.lock() else { return };
        self.file = None;
        let written = &mut state.written[self.index];
        written.writers -= 1;
        if !self.is_kept {
            written.bytes.remove(self.bytes.clone());
            written.is_written = false;
        }
    }
}

/// A writer to which the bytes of one tensor are appended. The tensor counts as written once [`TensorWriter::finish`] has
/// returned; dropped before that, it can be written again.
#[derive(Debug)]
pub struct TensorWriter {
    claim: Claim,
    next: u64,
    nbytes: u64,
}

impl TensorWriter {
    pub(super) fn new(claim: Claim) -> TensorWriter {
        let nbytes = claim.bytes.end;
        TensorWriter { claim, next: 0, nbytes }
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BufferSize`] if they are more than the tensor has; [`ErrorKind::Io`].
    pub fn write<'a>(&mut self, bytes: impl Into<RawBytes<'a>>) -> Result<()> {
        let bytes = bytes.into();
        let end = self.next + bytes.len() as u64;
        if end > self.nbytes {
            return Err(self.wrong_size(end));
        }
        self.claim.write(self.next, bytes)?;
        self.next = end;
        Ok(())
    }

    /// Declares the tensor complete.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BufferSize`] if it is not.
    pub fn finish(self) -> Result<()> {
        if self.next != self.nbytes {
            return Err(self.wrong_size(self.next));
        }
        self.claim.keep();
        Ok(())
    }

    fn wrong_size(&self, given: u64) -> Error {
        let shared = &self.claim.shared;
        let name = &shared.tensors[self.claim.index].name;
        let detail = format!("tensor {name:?} takes {} bytes, but {given} were given", self.nbytes);
        shared.fail(ErrorKind::BufferSize, detail)
    }
}
