//! What a new file takes over from the one that it replaces: owner, group and permissions. And its space.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

/// Gives `file` the owner, the group and the permissions of `old`, as far as this process may.
///
/// Only root may give a file away, and only to an owner that its user namespace knows; everyone may give one to a
/// group that they are in. Where the group cannot be kept, the new one gets no more rights than all others have.
pub(super) fn take_over(file: &File, old: &Metadata) -> io::Result<()> {
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (old.uid(), old.gid())
        && !try_chown(file, Some(old.uid()), Some(old.gid()))?
        && own.gid() != old.gid()
    {
        try_chown(file, None, Some(old.gid()))?;
    }
    let now = file.metadata()?;
    let mut mode = old.mode() & 0o7777;
    if now.uid() != old.uid() || now.gid() != old.gid() {
        // The set-user-ID and set-group-ID bits would speak of another owner now.
        mode &= 0o1777;
    }
    if now.gid() != old.gid() {
        let for_all = (mode & 0o007) << 3;
        mode &= !0o070 | for_all;
    }
    if now.mode() & 0o7777 == mode {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(mode))
}

/// Whether the owner could be changed; `false` where this process may not, or the filesystem has no owners.
fn try_chown(file: &File, uid: Option<u32>, gid: Option<u32>) -> io::Result<bool> {
    match fchown(file, uid, gid) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EPERM | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => Ok(false),
            _ => Err(error),
        },
    }
}

/// Sets aside the blocks of a file of `length` bytes, so that a full disk is found before the first one is written.
pub(super) fn reserve(file: &File, length: u64) -> io::Result<()> {
    preallocate(file, 0, length)
}

/// The same for a file that keeps its contents and its length until they are written over.
pub(super) fn reserve_beyond(file: &File, length: u64) -> io::Result<()> {
    preallocate(file, libc::FALLOC_FL_KEEP_SIZE, length)
}

fn preallocate(file: &File, mode: libc::c_int, length: u64) -> io::Result<()> {
    let length = libc::off_t::try_from(length).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    if length == 0 {
        return Ok(());
    }
    loop {
        // SAFETY: a call without pointers on a descriptor that `file` keeps open.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // A filesystem without preallocation: the writes will find the space, or say that there is none.
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::ESPIPE) => {
                return Ok(());
            }
            _ => return Err(error),
        }
    }
}
