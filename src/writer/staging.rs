//! The file beside the target: where it goes, how it is made, how it gets a name.

use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::strays;

/// As many links as the kernel follows in one path.
const MAX_SYMLINKS: usize = 40;

/// Where the bytes are until the commit.
#[derive(Debug)]
pub(super) enum Staging {
    /// A file without a name (`O_TMPFILE`), which vanishes with the process.
    Unnamed,
    /// A file beside the target.
    Named(PathBuf),
    /// The target itself: a pipe or a device, or a file that was put in place.
    Direct,
}

/// Follows the symbolic links at the end of `path`, also to a place where there is nothing yet.
pub(super) fn follow_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_path_buf();
    for _ in 0..MAX_SYMLINKS {
        match std::fs::read_link(&path) {
            Ok(link) => path = directory_of(&path).join(link),
            // No link: EINVAL for other files, ENOENT where there is nothing.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
                return Ok(path);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

pub(super) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// What a fresh name is for, which its ending tells.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    /// A file that is being written: removed by a later save should its process be killed.
    Staged,
    /// The one whole copy of what a file in place is being overwritten with.
    Whole,
    /// What something new is about to take the place of.
    Old,
}

impl Purpose {
    fn suffix(self) -> &'static str {
        match self {
            Purpose::Staged => strays::SUFFIX,
            Purpose::Whole => ".whole",
            Purpose::Old => ".old",
        }
    }
}

/// A new file in the target's directory: without a name where the filesystem can, else under a fresh one. With
/// `private`, nobody else can open it until it is given other permissions.
pub(super) fn stage(target: &Path, private: bool) -> io::Result<(File, Staging)> {
    if target.file_name().is_none() || target.as_os_str().as_bytes().ends_with(b"/") {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    let mode = if private { 0o600 } else { 0o666 };
    match options(mode).custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(directory_of(target)) {
        // Without /proc an unnamed file could never be given a name.
        Ok(file) if Path::new(&descriptor_path(&file)).exists() => return Ok((file, Staging::Unnamed)),
        // Kernels and filesystems without O_TMPFILE answer this or that, and some in words that mislead (of a folder that
        // was removed ext4 says EPERM). What is wrong with the folder itself, a file with a name will hear.
        Ok(_) | Err(_) => {}
    }
    stage_named(target, mode).map(|(file, name)| (file, Staging::Named(name)))
}

/// The same under a fresh name, which is given too, with what the umask leaves of `mode`.
pub(super) fn stage_named(target: &Path, mode: u32) -> io::Result<(File, PathBuf)> {
    let create = |name: &Path| options(mode).create_new(true).open(name);
    let (file, name) = with_fresh_name(target, Purpose::Staged, create)?;
    strays::claim(&file);
    Ok((file, name))
}

/// Readable too: should the target have to be overwritten in place, the bytes come from the staged file.
fn options(mode: u32) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(mode);
    options
}

/// Gives an unnamed file a fresh name beside `target`.
pub(super) fn link_beside(file: &File, target: &Path) -> io::Result<PathBuf> {
    strays::claim(file);
    with_fresh_name(target, Purpose::Staged, |name| link_unnamed(file, name)).map(|((), name)| name)
}

/// Renames `path` to a fresh name beside it, and gives that.
pub(super) fn set_aside(path: &Path, purpose: Purpose) -> io::Result<PathBuf> {
    let rename = |name: &Path| match name.symlink_metadata() {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => std::fs::rename(path, name),
    };
    with_fresh_name(path, purpose, rename).map(|((), name)| name)
}

/// Calls `make` with names beside `target` until one is free.
fn with_fresh_name<T>(
    target: &Path,
    purpose: Purpose,
    make: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<(T, PathBuf)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        // Short whatever the target's name: a long one with a suffix could pass the filesystem's limit.
        let name = format!("{}{}-{number}{}", strays::PREFIX, std::process::id(), purpose.suffix());
        let name = directory_of(target).join(name);
        match make(&name) {
            Ok(made) => return Ok((made, name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

fn descriptor_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

pub(super) fn link_unnamed(file: &File, name: &Path) -> io::Result<()> {
    let from = c_path(descriptor_path(file).as_ref())?;
    let to = c_path(name.as_os_str())?;
    // SAFETY: both are NUL-terminated strings that outlive the call.
    let linked = unsafe {
        libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW)
    };
    if linked == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn c_path(path: &OsStr) -> io::Result<CString> {
    CString::new(path.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Has the entry of `target` in its directory put on the disk.
pub(super) fn sync_directory(target: &Path) -> io::Result<()> {
    sync_folder(directory_of(target))
}

/// Has all entries of `folder` put on the disk.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // What filesystems answer whose directories need no synchronizing, or know none.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        outcome => outcome,
    }
}
