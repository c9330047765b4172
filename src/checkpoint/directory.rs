//! The directory that a checkpoint is written to.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::sys::directory::Directory;
use crate::sys::fork::OwnerProcess;
use crate::write::atomic::AtomicFile;

/// An open directory, and those that were created for it. Unless [`CheckpointDirectory::keep`] was called, dropping it
/// removes the created ones if they are empty.
#[derive(Debug)]
pub(super) struct CheckpointDirectory {
    handle: Arc<Directory>,
    /// The caller's path, for errors.
    path: PathBuf,
    /// Each with its parent and its name there; the innermost first.
    created: Vec<(Arc<Directory>, Arc<Directory>, OsString)>,
    is_kept: bool,
    process: OwnerProcess,
}

impl CheckpointDirectory {
    /// Opens the directory at `path`; creates what is missing of it.
    pub(super) fn create(path: &Path) -> Result<CheckpointDirectory> {
        let fail = |source| Error::io("create the directory", path, source);
        let (existing, missing) = open_existing(path).map_err(fail)?;
        let mut result = CheckpointDirectory {
            handle: Arc::new(existing),
            path: path.to_path_buf(),
            created: Vec::new(),
            is_kept: false,
            process: OwnerProcess::current(),
        };
        for name in missing {
            let parent = Arc::clone(&result.handle);
            let created = parent.create_directory(name);
            match (created, parent.subdirectory(name).map(Arc::new)) {
                (Ok(()), Ok(inner)) => {
                    result.handle = Arc::clone(&inner);
                    result.created.insert(0, (inner, parent, name.to_os_string()));
                }
                (Ok(()), Err(error)) => {
                    let _ = parent.remove_directory(name);
                    return Err(fail(error));
                }
                // Another process has created it at the same time.
                (Err(error), Ok(inner)) if error.kind() == io::ErrorKind::AlreadyExists => {
                    result.handle = inner;
                }
                (Err(error), _) => return Err(fail(error)),
            }
        }
        Ok(result)
    }

    pub(super) fn handle(&self) -> &Arc<Directory> {
        &self.handle
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the error of the operating system for `action` on the file `name`.
    pub(super) fn error(&self, action: &str, name: &str, source: io::Error) -> Error {
        Error::io(action, &self.path.join(name), source)
    }

    pub(super) fn create_file(&self, name: &str, length: u64) -> Result<AtomicFile> {
        AtomicFile::create_in(Arc::clone(&self.handle), name.into(), &self.path.join(name), length)
    }

    /// Returns the names in the directory that are `wanted`.
    pub(super) fn find(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let names = self.handle.names();
        let names = names.map_err(|source| Error::io("read the directory", &self.path, source))?;
        Ok(names.into_iter().filter_map(|name| name.into_string().ok().filter(|name| wanted(name))).collect())
    }

    /// Returns whether the directory contains the name, even if it is a dangling link.
    pub(super) fn contains(&self, name: &str) -> Result<bool> {
        // An error does not mean absent: the file would be overwritten, or removed by a rollback.
        let entry = self.handle.open_entry(name.as_ref());
        Ok(entry.map_err(|source| self.error("inspect", name, source))?.is_some())
    }

    /// Refuses a process that was forked from the one that began the checkpoint.
    pub(super) fn check_process(&self) -> Result<()> {
        self.process.check("save").map_err(|error| error.in_file(&self.path))
    }

    pub(super) fn keep(&mut self) {
        self.is_kept = true;
    }

    pub(super) fn synchronize_entries(&self) -> Result<()> {
        synchronize(&self.handle, &self.path)
    }

    /// Makes the entries of the directory durable, and the created directories themselves.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.synchronize_entries()?;
        self.created.iter().try_for_each(|(_, parent, _)| synchronize(parent, parent.path()))
    }
}

impl Drop for CheckpointDirectory {
    fn drop(&mut self) {
        if self.is_kept || !self.process.is_current() {
            return;
        }
        for (directory, parent, name) in &self.created {
            let is_same = || io::Result::Ok(parent.subdirectory(name)?.identity()? == directory.identity()?);
            if is_same().unwrap_or(true) {
                // Fails if another process has put something into it.
                let _ = parent.remove_directory(name);
            }
        }
    }
}

fn synchronize(directory: &Directory, path: &Path) -> Result<()> {
    directory.synchronize().map_err(|source| Error::io("synchronize the directory", path, source))
}

/// Opens the innermost existing directory of `path`, and returns the names below it that are missing, the outermost first.
fn open_existing(path: &Path) -> io::Result<(Directory, Vec<&OsStr>)> {
    let mut missing = Vec::new();
    for directory in path.ancestors() {
        let (at, name) = match directory.components().next_back() {
            Some(name) => (directory, Some(name.as_os_str())),
            None => (Path::new("."), None),
        };
        match Directory::open(at) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && name.is_some() => missing.extend(name),
            // An empty path.
            _ if name.is_none() && missing.is_empty() => break,
            opened => {
                missing.reverse();
                return opened.map(|directory| (directory, missing));
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::ENOENT))
}
