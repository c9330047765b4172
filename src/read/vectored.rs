//! Reads neighbouring ranges of a file with one call, past the page cache if that pays.

use crate::error::{Error, Result};
use crate::read::source::{OpenFile, shrank};
use crate::read::strategy::{COLD_READ_BYTES, ReadStrategy};
use crate::sys::direct_io::{BLOCK_BYTES, Direct, DirectReader, block_offset, read_vectored_at};
use crate::sys::page_cache::is_surely_cached;

/// The most destinations of one `preadv`; Linux allows 1024.
const MAX_PARTS: usize = 512;

/// Reads ranges of a file. Neighbours, however small they are, are read with one call: a run.
pub(super) struct VectoredReader<'a> {
    file: &'a OpenFile,
    /// The most bytes of one call.
    request_bytes: usize,
    direct: Option<DirectReader<'a>>,
    /// Whether cached bytes, and those of slow storage, are read directly too.
    is_always_direct: bool,
    /// The offset of the run in the file.
    start: u64,
    bytes: usize,
    /// The most bytes of this run.
    most_bytes: usize,
    /// The destinations of the run.
    parts: Vec<libc::iovec>,
}

impl<'a> VectoredReader<'a> {
    pub(super) fn new(file: &'a OpenFile, strategy: ReadStrategy) -> VectoredReader<'a> {
        let direct = (strategy.direct != Direct::Never).then(|| file.direct()).flatten();
        VectoredReader {
            file,
            request_bytes: strategy.request_bytes.unwrap_or(usize::MAX),
            direct: direct.map(|direct| DirectReader::new(direct, &file.storage_speed)),
            is_always_direct: strategy.direct == Direct::Always,
            start: 0,
            bytes: 0,
            most_bytes: 0,
            parts: Vec::new(),
        }
    }

    /// Begins a run that is read from `offset` on, first to `destination`.
    fn begin(&mut self, offset: u64, destination: *mut u8) {
        (self.start, self.bytes) = (offset, 0);
        self.parts.clear();
        let is_buffered = self.direct.is_some() && destination.addr() % BLOCK_BYTES != block_offset(offset);
        // Keeps the buffer small.
        self.most_bytes = self.request_bytes.min(if is_buffered { COLD_READ_BYTES } else { usize::MAX });
    }

    /// Returns how many more bytes fit. Runs of direct reads end where a block does.
    fn room(&self) -> usize {
        let skipped = if self.direct.is_some() { block_offset(self.start) } else { 0 };
        self.most_bytes.saturating_sub(skipped) - self.bytes
    }

    /// Adds a range. First reads the run if the range does not follow it, or if it is full.
    ///
    /// # Safety
    ///
    /// `destination` must be valid for writes of `length` bytes until the reader has finished or is dropped.
    pub(super) unsafe fn add(
        &mut self,
        mut offset: u64,
        mut destination: *mut u8,
        mut length: usize,
    ) -> Result<()> {
        while length > 0 {
            let follows = self.start + self.bytes as u64 == offset;
            if !follows || self.room() == 0 || self.parts.len() == MAX_PARTS {
                // SAFETY: the contract of the calls that added the parts.
                unsafe { self.read_run() }?;
                self.begin(offset, destination);
            }
            let taken = length.min(self.room());
            match self.parts.last_mut() {
                Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == destination.cast() => {
                    last.iov_len += taken;
                }
                _ => self.parts.push(libc::iovec { iov_base: destination.cast(), iov_len: taken }),
            }
            self.bytes += taken;
            offset += taken as u64;
            destination = destination.wrapping_add(taken);
            length -= taken;
        }
        Ok(())
    }

    /// Returns whether direct reads can read the parts: the filesystem allows them, and the parts are not cached.
    fn may_be_direct(&self) -> bool {
        let OpenFile { file, storage_speed, .. } = self.file;
        let range = self.start..self.start + self.bytes as u64;
        // The residency of the file is that of samples.
        self.direct.is_some()
            && !storage_speed.is_refused()
            && (self.is_always_direct || !is_surely_cached(file, range))
    }

    /// Reads all parts past the page cache. Returns false if buffered reads are needed: the storage is slow, the filesystem
    /// refuses, or the file ends early.
    ///
    /// # Safety
    ///
    /// As for [`VectoredReader::read_run`].
    unsafe fn read_direct(&mut self) -> Result<bool> {
        let OpenFile { path, storage_speed, .. } = self.file;
        match &mut self.direct {
            Some(direct) if self.is_always_direct || storage_speed.is_fast() => {
                // SAFETY: this function's contract covers the parts.
                unsafe { direct.read(self.start, &self.parts) }
                    .map_err(|source| Error::io("read", path, source))
            }
            _ => Ok(false),
        }
    }

    /// Reads the last run.
    ///
    /// # Safety
    ///
    /// As for [`VectoredReader::add`].
    pub(super) unsafe fn finish(mut self) -> Result<()> {
        // SAFETY: the contract of the calls that added the parts.
        unsafe { self.read_run() }
    }

    /// # Safety
    ///
    /// Every part must be valid for writes of its length.
    unsafe fn read_run(&mut self) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let may_be_direct = self.may_be_direct();
        // SAFETY: this function has the contract of `read_direct`.
        if may_be_direct && unsafe { self.read_direct() }? {
            return Ok(());
        }
        let _timer = may_be_direct.then(|| self.file.storage_speed.start(self.bytes));
        let file = self.file;
        let mut offset = self.start;
        let mut rest = &mut self.parts[..];
        while !rest.is_empty() {
            // SAFETY: this function's contract covers the parts; `rest` contains those that are not read yet.
            let mut count = unsafe { read_vectored_at(&file.file, rest, offset) }
                .map_err(|source| Error::io("read", &file.path, source))?;
            if count == 0 {
                return Err(shrank(&file.path));
            }
            offset += count as u64;
            while let Some(part) = rest.first_mut() {
                if count < part.iov_len {
                    part.iov_base = part.iov_base.wrapping_byte_add(count);
                    part.iov_len -= count;
                    break;
                }
                count -= part.iov_len;
                rest = &mut rest[1..];
            }
        }
        Ok(())
    }
}
