//! Overwrites the header of a file. Not atomic: a power cut can leave a part of the new header.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::entry::Entry;
use crate::error::{Error, ErrorKind, Result};
use crate::read::source::read_exact_at;
use crate::sys::signals::block_write_signals;
use crate::write::write_back::check_deferred_errors;

#[derive(Debug)]
pub(super) struct HeaderOverwrite {
    file: File,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl HeaderOverwrite {
    /// Opens the file for writing. `new` has the old header's length.
    pub(super) fn open(entry: &Entry, new: Vec<u8>) -> Result<HeaderOverwrite> {
        let file = open(entry)?;
        let mut old = vec![0; new.len()];
        read_exact_at(&file, &entry.path, &mut old, 0)?;
        Ok(HeaderOverwrite { file, old, new })
    }

    pub(super) fn run(&self, path: &Path, durable: bool) -> Result<()> {
        block_write_signals(|| write_over(&self.file, path, &self.old, &self.new, durable))
    }
}

/// Opens the file for writing. Refuses a file that has another name, because its contents would change there too.
fn open(entry: &Entry) -> Result<File> {
    let refuse = |detail: String| Error::new(ErrorKind::InvalidArgument, detail).in_file(&entry.path);
    if entry.is_link {
        let detail = "a symbolic link cannot be edited in place, because the file it leads to would change; edit that \
                      file, or leave in_place out";
        return Err(refuse(detail.into()));
    }
    let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = entry.directory.open_at(&entry.name, flags, 0);
    let file = file.map_err(|source| Error::io("write", &entry.path, source))?;
    let now = file.metadata().map_err(|source| Error::io("inspect", &entry.path, source))?;
    let names = now.nlink();
    entry.check_metadata(Ok(Some(now)))?;
    if names > 1 {
        return Err(refuse(format!(
            "the file has {names} names (hard links), and an edit in place would change it under all of them; leave \
             in_place out"
        )));
    }
    Ok(file)
}

/// Writes the part of `new` that differs from `old` with one call. Restores `old` if that fails, or if synchronizing
/// does: a later edit would otherwise take the new header for written.
fn write_over(file: &File, path: &Path, old: &[u8], new: &[u8], durable: bool) -> Result<()> {
    let differs = |(index, (old, new)): (usize, (&u8, &u8))| (old != new).then_some(index);
    let mut differences = old.iter().zip(new).enumerate().filter_map(differs);
    let Some(first) = differences.next() else { return Ok(()) };
    let end = differences.next_back().unwrap_or(first) + 1;
    let written = file.write_all_at(&new[first..end], first as u64);
    written.map_err(|source| restore(file, path, old, first..end, source))?;
    let synchronized = if durable { file.sync_all() } else { Ok(()) };
    synchronized.and_then(|()| check_deferred_errors(file)).map_err(|source| {
        restore(file, path, old, first..end, source).with_remedy(
            "after a loss of power it may have the new metadata nevertheless: run the edit again",
        )
    })
}

/// Restores `range` of a header after the error `source`; returns the error to report.
fn restore(file: &File, path: &Path, old: &[u8], range: Range<usize>, source: io::Error) -> Error {
    let error = Error::io("write", path, source);
    match file.write_all_at(&old[range.clone()], range.start as u64) {
        Ok(()) => error.with_remedy("the old header is in its place again"),
        Err(second) => error.with_remedy(&format!(
            "nor could its old header be restored, which may be written over in part: {second}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_difference_is_written_and_restored() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let read = || std::fs::read(&path).expect("read");
        std::fs::write(&path, b"0123456789").expect("written");
        let file = File::options().read(true).write(true).open(&path).expect("opened");
        // The bytes before and after the difference are wrong here, and stay in the file.
        write_over(&file, &path, b"..2345..", b"..a34b..", true).expect("written");
        assert_eq!(read(), b"01a34b6789");
        write_over(&file, &path, b"same", b"same", false).expect("nothing to do");
        assert_eq!(read(), b"01a34b6789");
        let error = restore(&file, &path, b"0123456789", 2..6, io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(read(), b"0123456789");
        assert!(error.to_string().contains("the old header is in its place again"), "{error}");

        let closed = File::open(&path).expect("opened for reading");
        let error = write_over(&closed, &path, b"0", b"1", false).expect_err("refused");
        assert_eq!(error.os_error(), Some(libc::EBADF));
        assert!(error.to_string().contains("nor could its old header be restored"), "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");

        // A device that takes every byte and cannot be synchronized.
        let null = File::options().read(true).write(true).open("/dev/null").expect("opened");
        write_over(&null, &path, b"0", b"1", false).expect("written");
        let error = write_over(&null, &path, b"0", b"1", true).expect_err("refused");
        assert_eq!(error.os_error(), Some(libc::EINVAL));
        assert!(
            error.to_string().contains("in its place again; after a loss of power it may have the new"),
            "{error}"
        );
    }
}
