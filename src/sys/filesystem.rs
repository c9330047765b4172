//! The kind of filesystem that a file is on.

use std::ffi::CStr;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// A kind of filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filesystem {
    pub(crate) name: &'static CStr,
    pub(crate) scope: Scope,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Only this machine can access it.
    Local,
    /// A server answers each request, so many must be in flight.
    Remote,
    /// As `Remote`; another process passes the requests on, of which the kernel allows a dozen by default.
    Fuse,
    Unknown,
}

/// The `statfs` types and names of filesystems, from the kernel's include/uapi/linux/magic.h and from the sources of those
/// outside the kernel. FUSE includes virtiofs.
const KINDS: [(u32, &CStr, Scope); 30] = [
    (0xEF53, c"ext4", Scope::Local),
    (0x5846_5342, c"xfs", Scope::Local),
    (0x9123_683E, c"btrfs", Scope::Local),
    (0xF2F5_2010, c"f2fs", Scope::Local),
    (0x2FC1_2FC1, c"zfs", Scope::Local),
    (0x0102_1994, c"tmpfs", Scope::Local),
    (0x794C_7630, c"overlay", Scope::Local),
    (0x4D44, c"fat", Scope::Local),
    (0x2011_BAB0, c"exfat", Scope::Local),
    (0x7371_7368, c"squashfs", Scope::Local),
    (0xE0F5_E1E2, c"erofs", Scope::Local),
    (0x9FA0, c"proc", Scope::Unknown),
    (0x6969, c"nfs", Scope::Remote),
    (0x0BD0_0BD0, c"lustre", Scope::Remote),
    (0x6573_5546, c"fuse", Scope::Fuse),
    (0x4750_4653, c"gpfs", Scope::Remote),
    (0x0102_1997, c"9p", Scope::Remote),
    (0x517B, c"smb", Scope::Remote),
    (0xFF53_4D42, c"cifs", Scope::Remote),
    (0xFE53_4D42, c"smb2", Scope::Remote),
    (0x00C3_6400, c"ceph", Scope::Remote),
    (0x5346_414F, c"afs", Scope::Remote),
    (0x6B41_4653, c"afs", Scope::Remote),
    (0x1983_0326, c"beegfs", Scope::Remote),
    (0x7375_7245, c"coda", Scope::Remote),
    (0x7461_636F, c"ocfs2", Scope::Remote),
    (0x0116_1970, c"gfs2", Scope::Remote),
    (0xAAD7_AAEA, c"panfs", Scope::Remote),
    (0x786F_4256, c"vboxsf", Scope::Remote),
    (0xBACB_ACBC, c"vmhgfs", Scope::Remote),
];

impl Scope {
    /// Returns whether requests have a latency.
    pub(crate) fn is_remote(self) -> bool {
        matches!(self, Scope::Remote | Scope::Fuse)
    }
}

impl Filesystem {
    /// Returns the filesystem of `file`. On a network filesystem, this may cost a request.
    pub(crate) fn of(file: &File) -> Filesystem {
        let known = magic_of(file).and_then(|magic| KINDS.into_iter().find(|&(known, ..)| known == magic));
        known.map_or(Filesystem { name: c"unknown", scope: Scope::Unknown }, |(_, name, scope)| Filesystem {
            name,
            scope,
        })
    }
}

/// Returns whether this machine alone accesses the filesystem of `file`; false if that is unknown.
pub(crate) fn is_local(file: &File) -> bool {
    Filesystem::of(file).scope == Scope::Local
}

pub(crate) fn is_proc(file: &File) -> bool {
    Filesystem::of(file).name == c"proc"
}

/// Returns the `statfs` type of the filesystem of `file`; 32 bits of it are used.
fn magic_of(file: &File) -> Option<u32> {
    let mut answer = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `file` keeps the descriptor open; fstatfs writes at most one `statfs` to `answer`, and all of it if it
    // returns 0, so the read is of an initialized value.
    unsafe {
        let status = libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr());
        (status == 0).then(|| answer.assume_init().f_type as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tmpfs_is_local_and_proc_is_not() {
        let temporary = tempfile::tempfile_in("/dev/shm").expect("a file");
        assert_eq!(Filesystem::of(&temporary), Filesystem { name: c"tmpfs", scope: Scope::Local });
        assert!(is_local(&temporary) && !is_proc(&temporary));
        let process = File::open("/proc/self/status").expect("there");
        assert!(is_proc(&process) && !is_local(&process));
    }

    #[test]
    fn unlisted_filesystems_are_unknown() {
        let system = File::open("/sys/kernel/mm/transparent_hugepage/enabled").expect("there");
        assert_eq!(Filesystem::of(&system).scope, Scope::Unknown);
    }

    #[test]
    fn no_type_is_listed_twice() {
        for (index, kind) in KINDS.iter().enumerate() {
            assert!(KINDS[..index].iter().all(|other| other.0 != kind.0), "{kind:?}");
        }
    }
}
