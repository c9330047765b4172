//! Reserves the disk space of a file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Reserves the blocks of a new file of `length` bytes, so that a full disk is an error before the first write.
///
/// The file keeps its size, if the filesystem can do that: after a loss of power it is then too short, which readers
/// refuse, and has no zeros in place of data.
pub(crate) fn reserve(file: &File, length: u64) -> io::Result<()> {
    // NFS can only reserve space and set the length at once.
    if !preallocate(file, libc::FALLOC_FL_KEEP_SIZE, length)? {
        preallocate(file, 0, length)?;
    }
    Ok(())
}

/// Reserves the blocks of `length` bytes for a file that keeps its contents and size until it is overwritten.
pub(crate) fn reserve_beyond(file: &File, length: u64) -> io::Result<()> {
    preallocate(file, libc::FALLOC_FL_KEEP_SIZE, length)?;
    Ok(())
}

/// Returns `false` if the filesystem cannot do this: the writes then allocate, or fail.
fn preallocate(file: &File, mode: libc::c_int, length: u64) -> io::Result<bool> {
    let length = libc::off_t::try_from(length).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    if length == 0 {
        return Ok(true);
    }
    loop {
        // SAFETY: `fallocate` takes no pointer, and requires an open descriptor, which `file` owns during the call.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, length) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::ESPIPE) => {
                return Ok(false);
            }
            _ => return Err(error),
        }
    }
}
