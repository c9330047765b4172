//! Writes a file so that nobody ever sees half of it: beside the target first, then renamed over it.
//!
//! What it does where that is impossible is described in `docs/saving.md`. It knows nothing of headers and tensors.

use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::source::bad_path;

/// As many links as the kernel follows in one path.
const MAX_SYMLINKS: usize = 40;

/// A file that is being written, and is there under its name only once [`AtomicFile::commit`] has returned.
///
/// Dropped before that, it leaves the target as it was and nothing beside it.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    /// What the caller named; for the errors.
    path: PathBuf,
    /// `path` with its symbolic links followed.
    target: PathBuf,
    staging: Staging,
}

/// Where the bytes are until the commit.
#[derive(Debug)]
enum Staging {
    /// A file without a name (`O_TMPFILE`), which vanishes with the process.
    Unnamed,
    /// A file beside the target.
    Named(PathBuf),
    /// The target itself, a pipe or a device: there is nothing to replace.
    Direct,
}

impl AtomicFile {
    /// Begins a file of exactly `length` bytes that will be at `path`. A symbolic link is followed; an existing file's
    /// permissions (and its owner, where the process may) are taken over, a new one gets those of the umask.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): no such directory, no permission, no space for `length` bytes, the
    /// target is a directory.
    pub fn create(path: &Path, length: u64) -> Result<AtomicFile> {
        if path.as_os_str().as_bytes().contains(&0) {
            return Err(bad_path(path));
        }
        let fail = |source| Error::io("create", path, source);
        if path.as_os_str().is_empty() {
            return Err(fail(io::Error::from_raw_os_error(libc::ENOENT)));
        }
        let target = follow_links(path).map_err(fail)?;
        let existing = match std::fs::metadata(&target) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(fail(error)),
        };
        if let Some(metadata) = &existing {
            let kind = metadata.file_type();
            if kind.is_dir() {
                return Err(fail(io::Error::from_raw_os_error(libc::EISDIR)));
            }
            if kind.is_fifo() || kind.is_char_device() {
                let file = OpenOptions::new().write(true).open(&target).map_err(fail)?;
                return Ok(AtomicFile { file, path: path.to_path_buf(), target, staging: Staging::Direct });
            }
            if !kind.is_file() {
                return Err(fail(io::Error::from_raw_os_error(libc::ENODEV)));
            }
        }
        let (file, staging) = stage(&target).map_err(fail)?;
        // From here on, dropping `staged` removes what was staged.
        let staged = AtomicFile { file, path: path.to_path_buf(), target, staging };
        if let Some(metadata) = &existing {
            staged.take_over(metadata.uid(), metadata.gid(), metadata.permissions()).map_err(fail)?;
        }
        staged.reserve(length).map_err(|source| Error::io("reserve space for", path, source))?;
        Ok(staged)
    }

    /// Gives the staged file the target's owner and permissions.
    fn take_over(&self, uid: u32, gid: u32, permissions: Permissions) -> io::Result<()> {
        let own = self.file.metadata()?;
        if (own.uid(), own.gid()) != (uid, gid) {
            // Only root may give a file away (EPERM), and nobody to an owner that this user namespace does not know
            // (EINVAL) or on a filesystem without owners. Everyone else keeps what they wrote, as with every program.
            match fchown(&self.file, Some(uid), Some(gid)).map_err(|error| (error.raw_os_error(), error)) {
                Ok(()) | Err((Some(libc::EPERM | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP), _)) => {}
                Err((_, error)) => return Err(error),
            }
        }
        let wanted = permissions.mode() & 0o7777;
        if self.file.metadata()?.mode() & 0o7777 == wanted {
            return Ok(());
        }
        self.file.set_permissions(Permissions::from_mode(wanted))
    }

    /// Sets the blocks aside, so that a full disk is found before the first byte is written.
    fn reserve(&self, length: u64) -> io::Result<()> {
        let length = libc::off_t::try_from(length).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        if length == 0 {
            return Ok(());
        }
        loop {
            // SAFETY: a call without pointers on a descriptor that `self` keeps open.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), 0, 0, length) } == 0 {
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

    /// Appends `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|source| Error::io("write", &self.path, source))
    }

    /// Puts the file where the target was. With `sync`, returns once file and directory entry are on the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io); the target is then as it was, unless it could only be overwritten in
    /// place (`docs/saving.md`).
    pub fn commit(mut self, sync: bool) -> Result<()> {
        let committed = self.try_commit(sync);
        committed.map_err(|source| Error::io("write", &self.path, source))
    }

    fn try_commit(&mut self, sync: bool) -> io::Result<()> {
        if sync && !matches!(self.staging, Staging::Direct) {
            self.file.sync_all()?;
        }
        match &self.staging {
            Staging::Direct => return Ok(()),
            Staging::Unnamed => {
                // Nothing at the target: the link is the commit.
                match link_unnamed(&self.file, &self.target) {
                    Ok(()) => return if sync { sync_directory(&self.target) } else { Ok(()) },
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                    Err(_) => {}
                }
                let name = with_fresh_name(&self.target, |name| link_unnamed(&self.file, name))?.1;
                self.staging = Staging::Named(name);
            }
            Staging::Named(_) => {}
        }
        let Staging::Named(name) = &self.staging else { return Ok(()) };
        match std::fs::rename(name, &self.target) {
            Ok(()) => {
                self.staging = Staging::Direct;
                if sync { sync_directory(&self.target) } else { Ok(()) }
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EXDEV)) => {
                self.overwrite_in_place(sync)
            }
            Err(error) => Err(error),
        }
    }

    /// For a target that cannot be renamed over, such as a file that is itself a mount point.
    fn overwrite_in_place(&mut self, sync: bool) -> io::Result<()> {
        self.file.rewind()?;
        let mut target = OpenOptions::new().write(true).truncate(true).open(&self.target)?;
        io::copy(&mut self.file, &mut target)?;
        if sync { target.sync_all() } else { Ok(()) }
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Staging::Named(name) = &self.staging {
            // There is nobody left to tell; the error that led here is already on its way.
            let _ = std::fs::remove_file(name);
        }
    }
}

/// Follows the symbolic links at the end of `path`, also to a place where there is nothing yet.
fn follow_links(path: &Path) -> io::Result<PathBuf> {
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

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A new file in the target's directory: without a name where the filesystem can, else under a fresh one.
fn stage(target: &Path) -> io::Result<(File, Staging)> {
    if target.as_os_str().is_empty() {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    if target.file_name().is_none() || target.as_os_str().as_bytes().ends_with(b"/") {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    let mut options = OpenOptions::new();
    // Readable too: should the target have to be overwritten in place, the bytes come from here.
    options.read(true).write(true).mode(0o666).custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC);
    match options.open(directory_of(target)) {
        // Without /proc an unnamed file could never be given a name.
        Ok(file) if Path::new(&descriptor_path(&file)).exists() => return Ok((file, Staging::Unnamed)),
        Ok(_) => {}
        // What kernels and filesystems without O_TMPFILE answer.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {}
        Err(error) => return Err(error),
    }
    let (file, name) = with_fresh_name(target, |name| {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o666).open(name)
    })?;
    Ok((file, Staging::Named(name)))
}

/// Calls `make` with names beside `target` until one is free.
fn with_fresh_name<T>(target: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(T, PathBuf)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        // Short whatever the target's name: a long one with a suffix could pass the filesystem's limit.
        let name = directory_of(target).join(format!(".safetensors-{}-{number}.tmp", std::process::id()));
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

fn link_unnamed(file: &File, name: &Path) -> io::Result<()> {
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

fn sync_directory(target: &Path) -> io::Result<()> {
    match File::open(directory_of(target))?.sync_all() {
        // What filesystems answer whose directories need no synchronizing, or know none.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        outcome => outcome,
    }
}
