//! The kind of filesystem that a file is on.

use std::ffi::CStr;
use std::fs::{File, OpenOptions, read_to_string};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};

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
    /// Returns the filesystem of `file`. On a network filesystem, this may cost a request. The scope of an overlay is that of
    /// its layers.
    pub(crate) fn of(file: &File) -> Filesystem {
        let kind = Filesystem::of_mount(file);
        if kind.name == c"overlay" { Filesystem { scope: scope_of_overlay(file), ..kind } } else { kind }
    }

    /// As [`Filesystem::of`], without a look at the layers of an overlay.
    fn of_mount(file: &File) -> Filesystem {
        let known = magic_of(file).and_then(|magic| KINDS.into_iter().find(|&(known, ..)| known == magic));
        known.map_or(Filesystem { name: c"unknown", scope: Scope::Unknown }, |(_, name, scope)| Filesystem {
            name,
            scope,
        })
    }
}

/// Returns the scope of the first remote layer of the overlay that `file` is on; `Local` if there is none, or if the layers
/// are outside this process's root directory, as in a container.
fn scope_of_overlay(file: &File) -> Scope {
    const SCOPES: [Scope; 3] = [Scope::Local, Scope::Remote, Scope::Fuse];
    /// The last device number that was looked up, plus the number of its scope in `SCOPES`. Device numbers are reused: a
    /// later overlay may get the number of threads that suited another one.
    static LAST: AtomicU64 = AtomicU64::new(u64::MAX);

    let device = file.metadata().map_or(0, |metadata| metadata.dev()) << 2;
    let last = LAST.load(Ordering::Relaxed);
    if last & !3 == device
        && let Some(&scope) = SCOPES.get((last & 3) as usize)
    {
        return scope;
    }
    let scope = layers_of(file).iter().find_map(|layer| {
        // Needs no permission to read the directory, and asks no server to open it.
        let layer = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(layer).ok()?;
        Some(Filesystem::of_mount(&layer).scope).filter(|scope| scope.is_remote())
    });
    let scope = scope.unwrap_or(Scope::Local);
    let number = SCOPES.iter().position(|&it| it == scope).unwrap_or(0) as u64;
    LAST.store(device | number, Ordering::Relaxed);
    scope
}

/// Returns whether this machine alone accesses the filesystem of `file`; false if that is unknown. The upper layer of an
/// overlay, where files are written, is local.
pub(crate) fn is_local(file: &File) -> bool {
    Filesystem::of_mount(file).scope == Scope::Local
}

pub(crate) fn is_proc(file: &File) -> bool {
    Filesystem::of_mount(file).name == c"proc"
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

/// Returns the layers of the overlay that `file` is on; empty if the mount is not listed.
fn layers_of(file: &File) -> Vec<String> {
    // Files of one overlay have several device numbers, which are not those of the mount.
    let descriptor = read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap_or_default();
    let mount = descriptor.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let mounts = read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount.map_or(Vec::new(), |mount| layers_in(&mounts, mount.trim()))
}

/// Returns the directories that the overlay `mount` consists of. `mounts` has the format of `/proc/PID/mountinfo`.
fn layers_in(mounts: &str, mount: &str) -> Vec<String> {
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(mount));
    let options = line.and_then(|line| line.split_once(" - ")?.1.split(' ').nth(2)).unwrap_or_default();
    let values = options.split(',').filter_map(|option| match option.split_once('=')? {
        // Several layers of old mounts are in one option; each of new mounts has its own.
        ("lowerdir" | "lowerdir+" | "datadir+" | "upperdir", layers) => Some(layers),
        _ => None,
    });
    let paths = values.flat_map(|value| value.split(':').map(unescaped));
    // Others are relative to the working directory of whoever mounted them.
    paths.filter(|path| path.starts_with('/')).collect()
}

/// Returns `text` with the characters that the kernel has replaced by three octal digits.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_string();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte.into());
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
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
    fn the_layers_of_an_overlay() {
        let mounts = "\
            26 1 254:0 / / rw,relatime - ext4 /dev/root rw,upperdir=/of/another/kind\n\
            47 26 0:41 / /merged rw shared:7 - overlay overlay \
            rw,lowerdir=/a\\040b:relative:/c\\\\d,upperdir=/up,workdir=/work,uuid=on\n\
            470 26 0:42 / /new rw - overlay none ro,lowerdir+=/1,lowerdir+=/2,datadir+=/3\n";
        assert_eq!(layers_in(mounts, "47"), ["/a b", "/c\\\\d", "/up"]);
        assert_eq!(layers_in(mounts, "470"), ["/1", "/2", "/3"]);
        assert!(layers_in(mounts, "4").is_empty());
        assert_eq!(unescaped("\\1\\é\\054\\0541"), "\\1\\é,,1");
    }

    #[test]
    fn no_type_is_listed_twice() {
        for (index, kind) in KINDS.iter().enumerate() {
            assert!(KINDS[..index].iter().all(|other| other.0 != kind.0), "{kind:?}");
        }
    }
}
