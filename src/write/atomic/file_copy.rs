//! Copies bytes between files without reading them into this process, if the kernel can.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;

/// Appends up to `length` bytes of `source`, from `offset` on, to `target`; returns their number, 0 at the end of
/// `source`. Moves the position of `source`.
pub(crate) fn append(target: &mut File, mut source: &File, offset: u64, length: u64) -> io::Result<u64> {
    source.seek(SeekFrom::Start(offset))?;
    let begin = target.stream_position()?;
    loop {
        // Tries `copy_file_range` first.
        match io::copy(&mut source.take(length), target) {
            // A signal arrived, perhaps after a part was copied.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                let copied = target.stream_position()? - begin;
                if copied > 0 {
                    return Ok(copied);
                }
            }
            outcome => return outcome,
        }
    }
}

/// Appends up to `length` bytes of `source`, from `offset` on, to `target` by sharing their blocks, so that nothing is
/// copied or allocated. An error if the filesystem cannot, or if `offset`, the end of `target`, or the end of the range
/// is not at a block's boundary; the range may end at the end of `source`.
pub(crate) fn share(target: &mut File, source: &File, offset: u64, length: u64) -> io::Result<()> {
    let end = target.stream_position()?;
    let range = libc::file_clone_range {
        src_fd: source.as_raw_fd().into(),
        src_offset: offset,
        src_length: length,
        dest_offset: end,
    };
    // SAFETY: `ioctl` requires open descriptors, which the two `File`s own during the call, and for FICLONERANGE a
    // pointer to a `file_clone_range`, which `range` is.
    if unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE, &raw const range) } != 0 {
        return Err(io::Error::last_os_error());
    }
    target.seek(SeekFrom::Start(end + length)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn bytes_are_appended_until_the_source_ends() {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut source = tempfile::tempfile().expect("a file");
        source.write_all(&bytes).expect("written");
        let mut target = tempfile::tempfile().expect("a file");
        target.write_all(b"head").expect("written");
        assert_eq!(append(&mut target, &source, 5, 1_000_000).expect("copied"), 1_000_000);
        assert_eq!(append(&mut target, &source, 1_000_005, u64::MAX >> 1).expect("copied"), 1_999_995);
        assert_eq!(append(&mut target, &source, 3_000_000, 1).expect("at the end"), 0);
        let mut written = Vec::new();
        target.rewind().and_then(|()| target.read_to_end(&mut written)).expect("read");
        assert!(written[..4] == *b"head" && written[4..] == bytes[5..]);
    }

    #[test]
    fn devices_are_copied_to_through_memory() {
        let mut source = tempfile::tempfile().expect("a file");
        source.write_all(&[1; 10]).expect("written");
        let open = |path| File::options().write(true).open(path).expect("open");
        assert_eq!(append(&mut open("/dev/null"), &source, 0, 10).expect("copied"), 10);
        let error = append(&mut open("/dev/full"), &source, 0, 10).expect_err("full");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        share(&mut open("/dev/null"), &source, 0, 10).expect_err("a device has no blocks to share");
    }
}
