//! What kind of filesystem a file is on.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Filesystems that one machine has for itself, as `statfs` tells them.
const LOCAL: [libc::c_long; 8] = [
    libc::EXT4_SUPER_MAGIC as libc::c_long,
    libc::XFS_SUPER_MAGIC as libc::c_long,
    libc::BTRFS_SUPER_MAGIC as libc::c_long,
    libc::F2FS_SUPER_MAGIC as libc::c_long,
    libc::TMPFS_MAGIC as libc::c_long,
    libc::OVERLAYFS_SUPER_MAGIC as libc::c_long,
    libc::MSDOS_SUPER_MAGIC as libc::c_long,
    // Of exFAT, from the kernel's include/uapi/linux/magic.h.
    0x2011_BAB0,
];

/// Whether no other machine can have the filesystem of `file`, nor any server; false where that cannot be told.
pub(crate) fn is_local(file: &File) -> bool {
    kind_of(file).is_some_and(|kind| LOCAL.contains(&kind))
}

/// Whether `file` is one under /proc.
pub(crate) fn is_proc(file: &File) -> bool {
    kind_of(file) == Some(libc::PROC_SUPER_MAGIC as libc::c_long)
}

/// What `statfs` calls the filesystem of `file`.
fn kind_of(file: &File) -> Option<libc::c_long> {
    // SAFETY: a plain struct of integers, for which zeros are a value.
    let mut told: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a descriptor that `file` keeps open, and a place for the answer.
    let status = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut told) };
    (status == 0).then_some(told.f_type as libc::c_long)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_local_and_what_is_unknown_is_not() {
        assert!(is_local(&tempfile::tempfile_in("/dev/shm").expect("a file")));
        assert!(!is_local(&File::open("/proc/self/status").expect("there")));
    }
}
