//! Copies bytes from one file to another: by the kernel where it can, through memory of this process where it cannot.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// The most bytes that are in this process's memory.
const BUFFER_BYTES: u64 = 1 << 20;

/// Which of the two files refused.
#[derive(Debug)]
pub(crate) enum Failure {
    Read(io::Error),
    Write(io::Error),
}

/// Appends some bytes of `source`, from `offset` on, to `target`, but no more than `length`; gives their number, which
/// is 0 where `source` has no more.
pub(crate) fn append(
    target: &mut File,
    source: &File,
    offset: u64,
    length: u64,
) -> std::result::Result<u64, Failure> {
    match copy_in_kernel(target, source, offset, length) {
        // Some filesystems say 0 of files that they have bytes of.
        Ok(0) => copy_through_memory(target, source, offset, length),
        Ok(copied) => Ok(copied),
        Err(error) => match error.raw_os_error() {
            // Between filesystems, of a kind of file that has no such copies, or forbidden by a sandbox.
            Some(libc::EXDEV | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::EPERM) => {
                copy_through_memory(target, source, offset, length)
            }
            _ => Err(Failure::Write(error)),
        },
    }
}

/// With `copy_file_range`, to where `target` stands.
fn copy_in_kernel(target: &File, source: &File, offset: u64, length: u64) -> io::Result<u64> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let mut from = libc::off64_t::try_from(offset).map_err(too_large)?;
    let length = usize::try_from(length).map_err(too_large)?;
    loop {
        // SAFETY: two descriptors that their files keep open, and an offset of ours; the call touches no other memory.
        let copied = unsafe {
            libc::copy_file_range(
                source.as_raw_fd(),
                &raw mut from,
                target.as_raw_fd(),
                std::ptr::null_mut(),
                length,
                0,
            )
        };
        if copied >= 0 {
            return Ok(copied as u64);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn copy_through_memory(
    target: &mut File,
    source: &File,
    offset: u64,
    length: u64,
) -> std::result::Result<u64, Failure> {
    let mut buffer = vec![0; length.min(BUFFER_BYTES) as usize];
    let count = loop {
        match source.read_at(&mut buffer, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => break outcome.map_err(Failure::Read)?,
        }
    };
    target.write_all(&buffer[..count]).map_err(Failure::Write)?;
    Ok(count as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    type Copy = fn(&mut File, &File, u64, u64) -> u64;

    fn both() -> [Copy; 2] {
        [
            |target, source, offset, length| append(target, source, offset, length).expect("copied"),
            |target, source, offset, length| {
                copy_through_memory(target, source, offset, length).expect("copied")
            },
        ]
    }

    #[test]
    fn either_way_appends_what_is_there() {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut source = tempfile::tempfile().expect("a file");
        source.write_all(&bytes).expect("written");
        for copy in both() {
            let mut target = tempfile::tempfile().expect("a file");
            target.write_all(b"head").expect("written");
            let mut next = 5;
            loop {
                let copied = copy(&mut target, &source, next, u64::MAX >> 1);
                next += copied;
                if copied == 0 {
                    break;
                }
            }
            assert_eq!(next, bytes.len() as u64);
            let mut written = Vec::new();
            target.rewind().and_then(|()| target.read_to_end(&mut written)).expect("read");
            assert!(written[..4] == *b"head" && written[4..] == bytes[5..]);
            assert_eq!(copy(&mut target, &source, 0, 7), 7);
        }
    }

    #[test]
    fn what_the_kernel_cannot_copy_goes_through_memory() {
        // Of a kind of file that it does not copy to.
        let mut source = tempfile::tempfile().expect("a file");
        source.write_all(&[1; 10]).expect("written");
        let mut target = std::fs::OpenOptions::new().write(true).open("/dev/null").expect("open");
        assert!(copy_in_kernel(&target, &source, 0, 10).is_err());
        assert_eq!(append(&mut target, &source, 0, 10).expect("copied"), 10);
        let mut full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("open");
        let error = append(&mut full, &source, 0, 10).expect_err("full");
        assert!(
            matches!(&error, Failure::Write(error) if error.raw_os_error() == Some(libc::ENOSPC)),
            "{error:?}"
        );
    }
}
