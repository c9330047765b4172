//! The kind of filesystem that a file is on.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// The `statfs` types of filesystems that only one machine can access.
const LOCAL: [libc::c_long; 8] = [
    libc::EXT4_SUPER_MAGIC as libc::c_long,
    libc::XFS_SUPER_MAGIC as libc::c_long,
    libc::BTRFS_SUPER_MAGIC as libc::c_long,
    libc::F2FS_SUPER_MAGIC as libc::c_long,
    libc::TMPFS_MAGIC as libc::c_long,
    libc::OVERLAYFS_SUPER_MAGIC as libc::c_long,
    libc::MSDOS_SUPER_MAGIC as libc::c_long,
    // exFAT, from the kernel's include/uapi/linux/magic.h.
    0x2011_BAB0,
];

/// Returns whether this machine alone accesses the filesystem of `file`; false if that is unknown.
pub(crate) fn is_local(file: &File) -> bool {
    kind_of(file).is_some_and(|kind| LOCAL.contains(&kind))
}

pub(crate) fn is_proc(file: &File) -> bool {
    kind_of(file) == Some(libc::PROC_SUPER_MAGIC as libc::c_long)
}

/// Returns the `statfs` type of the filesystem of `file`.
fn kind_of(file: &File) -> Option<libc::c_long> {
    let mut answer = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `file` keeps the descriptor open; fstatfs writes at most one `statfs` to `answer`, and all of it if it
    // returns 0, so the read is of an initialized value.
    unsafe {
        let status = libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr());
        (status == 0).then(|| answer.assume_init().f_type as libc::c_long)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tmpfs_is_local_and_an_unlisted_filesystem_is_not() {
        assert!(is_local(&tempfile::tempfile_in("/dev/shm").expect("a file")));
        assert!(!is_local(&File::open("/proc/self/status").expect("there")));
    }
}
