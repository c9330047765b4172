//! Writes a file's data to the disk before the file replaces another one.
//!
//! A filesystem may write a rename to the disk before the data of the renamed file; a power cut between the two leaves
//! neither file. ext4 itself starts to write the data if a rename replaces a file, but only data without allocated blocks,
//! and the blocks of a staged file are allocated. The rename can also overtake a write that has only been started.
//!
//! Writing starts block by block as the file is filled, so that the commit waits little. Unlike `fsync`, this flushes
//! neither the disk's cache nor the filesystem's journal: both follow with the rename.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, IntoRawFd};

use crate::sys::raw_bytes::{self, RawBytes};

/// The bytes that are written to the disk at a time: a power of two, so that blocks end where (huge) pages end.
const BLOCK_BYTES: u64 = 8 << 20;

/// Returns once the data of `file` is on the disk, or in the disk's cache.
pub(crate) fn finish(file: &File) -> io::Result<()> {
    let all =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    match sync_file_range(file, 0..0, all) {
        // The kernel or a sandbox does not have this call.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => file.sync_data(),
        outcome => outcome,
    }
}

/// Returns the errors of earlier writes that the filesystem has kept until now. Network filesystems return them when a
/// descriptor is closed; a copy is closed here, because the file still needs its own.
pub(crate) fn check_deferred_errors(file: &File) -> io::Result<()> {
    let descriptor = file.try_clone()?.into_raw_fd();
    // SAFETY: `close` requires a descriptor that nothing else owns; `into_raw_fd` gave up the one that was cloned above.
    match unsafe { libc::close(descriptor) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // The descriptor is closed, and nothing was reported about the data.
            error if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            error => Err(error),
        },
    }
}

/// Starts writing the blocks that end in `written` to the disk.
fn start(file: &File, written: Range<u64>) {
    let blocks = floor(written.start)..floor(written.end);
    if !blocks.is_empty() {
        // `finish` reports errors of the disk, and writes whatever was not started.
        let _ = sync_file_range(file, blocks, libc::SYNC_FILE_RANGE_WRITE);
    }
}

fn floor(offset: u64) -> u64 {
    offset - offset % BLOCK_BYTES
}

/// Returns the number of bytes from `offset` to the end of its block, at most `length`.
fn in_block(offset: u64, length: usize) -> usize {
    length.min((BLOCK_BYTES - offset % BLOCK_BYTES) as usize)
}

/// Calls `sync_file_range`; an empty range means the whole file.
fn sync_file_range(file: &File, range: Range<u64>, flags: libc::c_uint) -> io::Result<()> {
    let offset = |offset: u64| libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput);
    let (begin, length) = (offset(range.start)?, offset(range.end - range.start)?);
    // SAFETY: `sync_file_range` takes no pointer, and requires an open descriptor, which `file` owns during the call.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), begin, length, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) fn write_all_at(file: &File, mut bytes: RawBytes<'_>, mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let (part, rest) = bytes.split_at(in_block(offset, bytes.len()));
        raw_bytes::write_all_at(file, part, offset)?;
        let end = offset + part.len() as u64;
        start(file, offset..end);
        (bytes, offset) = (rest, end);
    }
    Ok(())
}

/// A writer that appends to a file, and starts writing each full block to the disk.
pub(crate) struct Appender<'a> {
    file: &'a File,
    length: &'a mut u64,
}

impl<'a> Appender<'a> {
    /// Returns a writer for `file`, which has `length` bytes; `length` is updated.
    pub(crate) fn new(file: &'a File, length: &'a mut u64) -> Appender<'a> {
        Appender { file, length }
    }

    pub(crate) fn appended(&mut self, count: u64) {
        let end = *self.length + count;
        start(self.file, *self.length..end);
        *self.length = end;
    }

    /// Writes some bytes of `pieces`, which are not empty; returns how many. Does not write beyond the end of a block.
    pub(crate) fn write(&mut self, pieces: &[RawBytes<'_>]) -> io::Result<usize> {
        let mut room = in_block(*self.length, usize::MAX);
        let first = pieces[0].split_at(room.min(pieces[0].len())).0;
        let fits = |piece: &&RawBytes<'_>| {
            let rest = room.checked_sub(piece.len());
            room = rest.unwrap_or(0);
            rest.is_some()
        };
        let count = match pieces.iter().take_while(fits).count() {
            0 => raw_bytes::write(self.file, &[first])?,
            several => raw_bytes::write(self.file, &pieces[..several])?,
        };
        self.appended(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write::vectored;
    use std::io::{Read, Seek, Write};

    fn bytes(length: u64) -> Vec<u8> {
        (0..length).map(|n| (n % 251) as u8).collect()
    }

    fn content(mut file: File) -> Vec<u8> {
        let mut written = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut written)).expect("read");
        written
    }

    #[test]
    fn pieces_that_cross_blocks_are_appended_whole() {
        let bytes = bytes(2 * BLOCK_BYTES + 1234);
        for size in [1000, 700_001, BLOCK_BYTES as usize, usize::MAX] {
            let mut file = tempfile::tempfile().expect("a file");
            file.write_all(&bytes[..7]).expect("written");
            let mut length = 7;
            let pieces = bytes[7..].chunks(size.min(bytes.len()));
            vectored::write_all(pieces, |pieces| Appender::new(&file, &mut length).write(pieces))
                .expect("written");
            assert_eq!(length, bytes.len() as u64);
            finish(&file).expect("on the disk");
            assert!(content(file) == bytes, "{size}");
        }
    }

    #[test]
    fn no_append_crosses_a_block() {
        let file = tempfile::tempfile().expect("a file");
        let mut length = BLOCK_BYTES - 10;
        let mut appender = Appender::new(&file, &mut length);
        let pieces = [[0; 4], [1; 4], [2; 4]].concat();
        let pieces: Vec<RawBytes<'_>> = pieces.chunks(4).map(RawBytes::from).collect();
        assert_eq!(appender.write(&pieces).expect("written"), 8);
        assert_eq!(appender.write(&pieces).expect("written"), 2);
        assert_eq!(appender.write(&pieces).expect("written"), 12);
        assert_eq!(length, BLOCK_BYTES + 12);
    }

    #[test]
    fn bytes_that_cross_blocks_are_written_where_they_belong() {
        let bytes = bytes(2 * BLOCK_BYTES + 99);
        let file = tempfile::tempfile().expect("a file");
        let (first, last) = bytes.split_at(BLOCK_BYTES as usize - 1);
        write_all_at(&file, last.into(), first.len() as u64).expect("written");
        write_all_at(&file, first.into(), 0).expect("written");
        assert!(content(file) == bytes);
    }

    #[test]
    fn what_cannot_be_on_a_disk_is_an_error() {
        let (reader, _writer) = std::io::pipe().expect("a pipe");
        let error = finish(&File::from(std::os::fd::OwnedFd::from(reader))).expect_err("a pipe");
        assert_eq!(error.raw_os_error(), Some(libc::ESPIPE));
    }
}
