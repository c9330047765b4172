//! The file beside the target: how it is made, how it gets a name.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::leftovers;
use crate::sys::directory::{Directory, proc_path};

/// Where the bytes are until the commit.
#[derive(Debug)]
pub(crate) enum Staging {
    /// A file without a name (`O_TMPFILE`), which vanishes with the process.
    Unnamed,
    /// A file of this name beside the target.
    Named(OsString),
    /// The target itself: the file was put in place.
    InPlace,
}

/// What a fresh name is for, which its ending tells.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
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
            Purpose::Staged => leftovers::SUFFIX,
            Purpose::Whole => ".whole",
            Purpose::Old => ".old",
        }
    }
}

/// The permissions that a file is made with: those of every new file, which the kernel settles, or, if it is `private`,
/// none for anybody else until it gets those of a file that it replaces.
pub(crate) fn mode_of(private: bool) -> libc::mode_t {
    if private { 0o600 } else { 0o666 }
}

/// Makes a new file in `directory`: without a name if the filesystem can, else under a fresh one.
pub(crate) fn stage(directory: &Directory, mode: libc::mode_t) -> io::Result<(File, Staging)> {
    match directory.open_at(OsStr::new("."), libc::O_TMPFILE | libc::O_RDWR, mode) {
        // Without /proc an unnamed file could never be given a name.
        Ok(file) if Path::new(&proc_path(&file)).exists() => return Ok((file, Staging::Unnamed)),
        // Kernels and filesystems without O_TMPFILE answer this or that, and some in words that mislead (of a directory
        // that was removed ext4 says EPERM). What is wrong with the directory itself, a file with a name will hear.
        Ok(_) | Err(_) => {}
    }
    stage_named(directory, mode).map(|(file, name)| (file, Staging::Named(name)))
}

/// Makes a new file under a fresh name, which is returned too. It can be read: should the target have to be overwritten
/// in place, the bytes come from there.
pub(crate) fn stage_named(directory: &Directory, mode: libc::mode_t) -> io::Result<(File, OsString)> {
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
    let (file, name) = with_fresh_name(Purpose::Staged, |name| directory.open_at(name, flags, mode))?;
    leftovers::claim(&file);
    Ok((file, name))
}

/// Gives an unnamed file a fresh name.
pub(crate) fn link_beside(file: &File, directory: &Directory) -> io::Result<OsString> {
    leftovers::claim(file);
    with_fresh_name(Purpose::Staged, |name| directory.link(file, name)).map(|((), name)| name)
}

/// Renames the file `name` to a fresh name, and returns that.
pub(crate) fn set_aside(directory: &Directory, name: &OsStr, purpose: Purpose) -> io::Result<OsString> {
    let rename = |fresh: &OsStr| match directory.open_entry(fresh) {
        Ok(Some(_)) => Err(io::ErrorKind::AlreadyExists.into()),
        Ok(None) | Err(_) => directory.rename(name, fresh),
    };
    with_fresh_name(purpose, rename).map(|((), name)| name)
}

/// Calls `make` with names until one is free.
fn with_fresh_name<T>(purpose: Purpose, make: impl Fn(&OsStr) -> io::Result<T>) -> io::Result<(T, OsString)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        // Short whatever the target's name: a long one with a suffix could pass the filesystem's limit.
        let name: OsString =
            format!("{}{}-{number}{}", leftovers::PREFIX, std::process::id(), purpose.suffix()).into();
        match make(&name) {
            Ok(made) => return Ok((made, name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}
