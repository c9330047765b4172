//! Reads neighbouring ranges of a file with one call, past the page cache if that pays.

use crate::error::{Error, Result};
use crate::read::source::{OpenFile, shrank};
use crate::read::strategy::ReadStrategy;
use crate::sys::direct_io::{BUFFER_BYTES, Direct, DirectReader, ENDS_BYTES, block_offset, read_vectored_at};
use crate::sys::huge_pages::are_expensive;
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
    /// The most of these that a direct read puts into its buffer.
    buffered_bytes: usize,
    /// The destinations of the run.
    parts: Vec<libc::iovec>,
}

impl<'a> VectoredReader<'a> {
    pub(super) fn new(file: &'a OpenFile, strategy: ReadStrategy) -> VectoredReader<'a> {
        let direct = (strategy.direct != Direct::Never).then(|| file.direct()).flatten();
        VectoredReader {
            file,
            request_bytes: strategy.request_bytes.unwrap_or(usize::MAX),
            direct: direct.map(|direct| DirectReader::new(direct, &file.storage_speed, !are_expensive())),
            is_always_direct: strategy.direct == Direct::Always,
            start: 0,
            bytes: 0,
            buffered_bytes: 0,
            parts: Vec::new(),
        }
    }

    /// Begins a run that is read from `offset` on.
    fn begin(&mut self, offset: u64) {
        (self.start, self.bytes, self.buffered_bytes) = (offset, 0, 0);
        self.parts.clear();
    }

    /// Returns how many more bytes fit, for memory that is read in place or not. Runs of direct reads end where a block does.
    fn room(&self, is_in_place: bool) -> usize {
        let skipped = if self.direct.is_some() { block_offset(self.start) } else { 0 };
        let room = self.request_bytes.saturating_sub(skipped + self.bytes);
        let buffer = BUFFER_BYTES.saturating_sub(skipped + self.buffered_bytes);
        match is_in_place {
            _ if self.direct.is_none() => room,
            true if buffer >= ENDS_BYTES => room,
            true => 0,
            false => room.min(buffer),
        }
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
            let is_in_place =
                self.direct.as_ref().is_some_and(|direct| direct.reads_in_place(offset, destination));
            let follows = self.start + self.bytes as u64 == offset;
            if !follows || self.room(is_in_place) == 0 || self.parts.len() == MAX_PARTS {
                // SAFETY: the contract of the calls that added the parts.
                unsafe { self.read_run() }?;
                self.begin(offset);
            }
            let taken = length.min(self.room(is_in_place));
            match self.parts.last_mut() {
                Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == destination.cast() => {
                    last.iov_len += taken;
                }
                _ => self.parts.push(libc::iovec { iov_base: destination.cast(), iov_len: taken }),
            }
            self.bytes += taken;
            self.buffered_bytes += if is_in_place { ENDS_BYTES } else { taken };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::direct_io::BLOCK_BYTES;
    use crate::sys::filesystem::Scope;
    use crate::sys::page_cache::{Residency, cached_bytes};
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::path::Path;

    #[test]
    fn runs_of_any_parts_are_read_directly() {
        const LENGTH: usize = (12 << 20) + 77;
        let bytes: Vec<u8> = (0..LENGTH).map(|i| (i / 7) as u8).collect();
        let mut file = tempfile::tempfile_in(".").expect("a file");
        file.write_all(&bytes).and_then(|()| file.sync_all()).expect("written");
        // SAFETY: `file` keeps the descriptor open, and the call takes no pointer.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let file = OpenFile::new(file, Path::new("name"));
        let Some(direct) = file.direct() else { return };
        if cached_bytes(&file.file, 0..LENGTH as u64) != Some(0) {
            return; // tmpfs drops nothing
        }
        let strategy = ReadStrategy {
            residency: Residency::Cold,
            scope: Scope::Local,
            threads: 1,
            request_bytes: Some(8 << 20),
            chunk_bytes: 8 << 20,
            direct: Direct::Always,
        };
        let mut memory = vec![0u8; LENGTH + 2000 * 2 * BLOCK_BYTES];
        let base = memory.as_mut_ptr();
        for (is_in_place, sizes) in [
            (true, [LENGTH, LENGTH]),
            (false, [LENGTH, LENGTH]),
            (true, [3 << 20, 9000]),
            (true, [100, 40_000]),
            (false, [100, 40_000]),
        ] {
            let mut reader = VectoredReader::new(&file, strategy);
            reader.direct = Some(DirectReader::new(direct, &file.storage_speed, is_in_place));
            let (mut begin, mut to, mut places) = (0, base.align_offset(BLOCK_BYTES), Vec::new());
            while begin < LENGTH {
                let number = places.len();
                let end = LENGTH.min(begin + 1 + (number + 1) * 7_654_321 % sizes[number % 2]);
                let shift = if number % 3 == 2 { 64 } else { 0 };
                let block = base.wrapping_add(to).align_offset(BLOCK_BYTES);
                to += block + begin % BLOCK_BYTES + shift;
                // SAFETY: the parts follow one another in `memory`, which has two blocks for each beside its bytes.
                unsafe { reader.add(begin as u64, base.wrapping_add(to), end - begin) }.expect("read");
                places.push((to, begin..end));
                to += end - begin;
                begin = end;
            }
            assert!(places.len() <= 2000 && to <= LENGTH + 2000 * 2 * BLOCK_BYTES, "{}", places.len());
            // SAFETY: as above.
            unsafe { reader.finish() }.expect("read");
            for (to, range) in places {
                // SAFETY: the part is in `memory`, and the reader is gone.
                let read = unsafe { std::slice::from_raw_parts(base.wrapping_add(to), range.len()) };
                assert!(read == &bytes[range.clone()], "{is_in_place} {range:?}");
            }
            assert_eq!(cached_bytes(&file.file, 0..LENGTH as u64), Some(0), "{is_in_place} {sizes:?}");
        }
    }
}
