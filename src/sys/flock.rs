//! Locks on open files (`flock`), which the kernel gives back however a process ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Changes the lock on `file` as `operation` says: `LOCK_EX`, `LOCK_SH` or `LOCK_UN`, with `LOCK_NB` not to wait.
pub(crate) fn flock(file: &File, operation: libc::c_int) -> io::Result<()> {
    // SAFETY: a call without pointers on a descriptor that `file` keeps open.
    match unsafe { libc::flock(file.as_raw_fd(), operation) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
