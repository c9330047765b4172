//! The file beside the target: how it is created, named, and removed if it is dropped.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::attributes::Attributes;
use super::leftovers;
use crate::error::{Error, Result};
use crate::sys::directory::{Directory, proc_path};
use crate::sys::fork::OwnerProcess;
use crate::write::write_back;

/// A file that will replace its target. Removed if it still has a hidden name when it is dropped.
#[derive(Debug)]
pub(crate) struct StagedFile {
    pub(crate) file: File,
    /// The target's path as the caller gave it; errors name it.
    pub(crate) path: PathBuf,
    pub(crate) directory: Arc<Directory>,
    /// The target's name in the directory.
    pub(crate) name: OsString,
    pub(crate) location: Location,
    /// The target's attributes at the creation, used if the target is gone at the commit.
    pub(crate) attributes: Option<Attributes>,
    pub(crate) process: OwnerProcess,
    /// Whether the contents were synchronized. A copy of them must be, then.
    pub(crate) is_synchronized: AtomicBool,
    /// Whether the target was overwritten in part, so that its old contents are lost.
    pub(crate) has_overwritten: bool,
}

#[derive(Debug)]
pub(crate) enum Location {
    /// Nowhere (`O_TMPFILE`): it vanishes with the process.
    Unnamed,
    /// Beside the target, under this hidden name.
    Named(OsString),
    Target,
}

impl StagedFile {
    pub(crate) fn create(directory: Arc<Directory>, name: OsString, path: &Path) -> io::Result<StagedFile> {
        let attributes = Attributes::at(&directory, &name)?;
        let (file, location) = create_beside(&directory, creation_mode(attributes.is_some()))?;
        Ok(StagedFile {
            file,
            path: path.to_path_buf(),
            directory,
            name,
            location,
            attributes,
            process: OwnerProcess::current(),
            is_synchronized: AtomicBool::default(),
            has_overwritten: false,
        })
    }

    pub(crate) fn fail(&self, source: io::Error) -> Error {
        Error::io("write", &self.path, source)
    }

    /// Refuses use in a child that was forked after the creation.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.process.check("save").map_err(|error| error.in_file(&self.path))
    }

    /// Gives the file the target's present attributes, or its earlier ones if it is gone; returns whether the file has
    /// changed.
    fn inherit_attributes(&self) -> io::Result<bool> {
        let now = Attributes::at(&self.directory, &self.name)?;
        let attributes = now.as_ref().or(self.attributes.as_ref());
        attributes.map_or(Ok(false), |attributes| attributes.inherit(&self.file))
    }

    /// Inherits the attributes, synchronizes the change if the file was synchronized, then calls `check`.
    pub(crate) fn inherit_attributes_if(&self, check: impl Fn() -> Result<()>) -> Result<()> {
        let fail = |source| self.fail(source);
        if self.inherit_attributes().map_err(fail)? && self.is_synchronized.load(Ordering::Relaxed) {
            self.file.sync_all().map_err(fail)?;
        }
        check()
    }

    /// Writes the data to the disk, unless the file was synchronized.
    pub(crate) fn write_back(&self) -> Result<()> {
        if self.is_synchronized.load(Ordering::Relaxed) {
            return Ok(());
        }
        write_back::finish(&self.file).map_err(|source| self.fail(source))
    }

    pub(crate) fn synchronize(&self) -> io::Result<()> {
        self.inherit_attributes()?;
        self.file.sync_all()?;
        self.is_synchronized.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn synchronize_directory(&self) -> Result<()> {
        self.directory.synchronize().map_err(|source| {
            Error::io("synchronize the directory of", &self.path, source).with_remedy(
                "the new file is in place and complete, but after a loss of power what was there before may be back: save it \
                 again",
            )
        })
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        let Location::Named(name) = &self.location else { return };
        if self.process.is_current() {
            // A failure cannot be reported; the error that led here is already returned.
            let _ = self.directory.remove(name);
        }
    }
}

/// The purpose of a hidden name, which its ending shows.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    /// A staged file. A later save removes it if its process was killed.
    Staged,
    /// The only complete copy of a file that is being overwritten in place.
    Complete,
    /// A file that is about to be replaced.
    Backup,
}

impl Purpose {
    fn suffix(self) -> &'static str {
        match self {
            Purpose::Staged => leftovers::SUFFIX,
            Purpose::Complete => ".whole",
            Purpose::Backup => ".old",
        }
    }
}

/// The mode to create a file with: the kernel's choice for every new file, or, if it is `private`, none for others until
/// it inherits the attributes of the file that it replaces.
pub(crate) fn creation_mode(private: bool) -> libc::mode_t {
    if private { 0o600 } else { 0o666 }
}

/// Creates a file in `directory`: without a name if the filesystem can, otherwise under a hidden one.
fn create_beside(directory: &Directory, mode: libc::mode_t) -> io::Result<(File, Location)> {
    match directory.open_at(OsStr::new("."), libc::O_TMPFILE | libc::O_RDWR, mode) {
        // Without /proc an unnamed file could never get a name.
        Ok(file) if Path::new(&proc_path(&file)).exists() => return Ok((file, Location::Unnamed)),
        // Filesystems without O_TMPFILE return various errors, some of them misleading (ext4 says EPERM if the directory
        // was removed). Creating a named file returns the right error.
        Ok(_) | Err(_) => {}
    }
    create_named(directory, mode).map(|(file, name)| (file, Location::Named(name)))
}

/// Creates a file under a hidden name, and returns both. The file is readable, because it is the source if the target
/// must be overwritten in place.
pub(crate) fn create_named(directory: &Directory, mode: libc::mode_t) -> io::Result<(File, OsString)> {
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
    let (file, name) = with_hidden_name(Purpose::Staged, |name| directory.open_at(name, flags, mode))?;
    leftovers::lock(&file);
    Ok((file, name))
}

/// Links an unnamed file to a hidden name.
pub(crate) fn link_beside(file: &File, directory: &Directory) -> io::Result<OsString> {
    leftovers::lock(file);
    with_hidden_name(Purpose::Staged, |name| directory.link(file, name)).map(|((), name)| name)
}

/// Renames the file `name` to a hidden name, and returns that.
pub(crate) fn rename_to_backup(directory: &Directory, name: &OsStr) -> io::Result<OsString> {
    rename_to_hidden(directory, name, Purpose::Backup)
}

/// Renames the file `name` to a hidden name with this purpose, and returns that.
pub(crate) fn rename_to_hidden(
    directory: &Directory,
    name: &OsStr,
    purpose: Purpose,
) -> io::Result<OsString> {
    let rename = |hidden: &OsStr| match directory.open_entry(hidden) {
        Ok(Some(_)) => Err(io::ErrorKind::AlreadyExists.into()),
        Ok(None) | Err(_) => directory.rename(name, hidden),
    };
    with_hidden_name(purpose, rename).map(|((), name)| name)
}

/// Renames the staged file `name` to the hidden name with this number, and returns that. Fails if it exists.
pub(crate) fn rename_to_number(directory: &Directory, name: &OsStr, number: u64) -> io::Result<OsString> {
    let numbered = hidden_name(number, Purpose::Staged);
    match directory.open_entry(&numbered)? {
        Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
        None => directory.rename(name, &numbered).map(|()| numbered),
    }
}

// Not derived from the target's name: with a suffix that could exceed the filesystem's limit.
fn hidden_name(number: u64, purpose: Purpose) -> OsString {
    format!("{}{}-{number}{}", leftovers::PREFIX, std::process::id(), purpose.suffix()).into()
}

/// Calls `make` with new hidden names until one does not exist yet.
fn with_hidden_name<T>(
    purpose: Purpose,
    make: impl Fn(&OsStr) -> io::Result<T>,
) -> io::Result<(T, OsString)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = hidden_name(number, purpose);
        match make(&name) {
            Ok(made) => return Ok((made, name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}
