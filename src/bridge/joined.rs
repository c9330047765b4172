//! Writing a part of a file that another process commits.

use super::ffi::{Piece, Spec};
use super::save::{as_spec, raw_bytes};
use super::{Result, as_path};
use crate::error::{Error, ErrorKind};
use crate::format::slice::{AxisRange, Slice};
use crate::sys::raw_bytes::RawBytes;
use crate::write::joined::JoinedFile;

/// Slices of tensors in one file, whose bytes are appended.
pub struct JoinedWriter {
    file: JoinedFile,
    /// Each with the index of its tensor.
    slices: Vec<(usize, Slice)>,
    /// The slice that the next byte belongs to, and how many of its bytes are written.
    next: usize,
    offset: u64,
}

pub fn join_file(path: &[u8]) -> Result<Box<JoinedWriter>> {
    Ok(Box::new(JoinedWriter {
        file: JoinedFile::open(as_path(path))?,
        slices: Vec::new(),
        next: 0,
        offset: 0,
    }))
}

impl JoinedWriter {
    pub fn add(&mut self, spec: &Spec<'_>, starts: &[u64]) -> Result<()> {
        let spec = as_spec(spec)?;
        let range =
            |(&start, &size): (&u64, &u64)| AxisRange { start, stop: start.saturating_add(size), step: 1 };
        let ranges: Vec<AxisRange> = starts.iter().zip(spec.shape).map(range).collect();
        self.slices.push(self.file.plan_slice(spec.name, Some(spec.dtype), &ranges)?);
        Ok(())
    }

    /// # Safety
    ///
    /// The bytes of `pieces` must be valid for reads during the call.
    pub unsafe fn write(&mut self, pieces: &[Piece]) -> Result<()> {
        // SAFETY: the clause above.
        Ok(unsafe { raw_bytes(pieces) }.try_for_each(|piece| self.append(piece))?)
    }

    fn append(&mut self, mut piece: RawBytes<'_>) -> std::result::Result<(), Error> {
        while !piece.is_empty() {
            let Some((index, slice)) = self.slices.get(self.next) else {
                return Err(Error::new(ErrorKind::BufferSize, "more bytes than the slices have"));
            };
            let left = slice.nbytes() - self.offset;
            let (part, rest) = piece.split_at((piece.len() as u64).min(left) as usize);
            self.file.write_part(*index, slice, self.offset, part)?;
            self.offset += part.len() as u64;
            if self.offset == slice.nbytes() {
                (self.next, self.offset) = (self.next + 1, 0);
            }
            piece = rest;
        }
        Ok(())
    }
}

// By value, because the bridge transfers ownership of a Box.
#[allow(clippy::boxed_local)]
pub fn finish_joined(writer: Box<JoinedWriter>, durable: bool) -> Result<()> {
    Ok(writer.file.finish(durable)?)
}
