//! The file that is edited, as it was when the edit began.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::read::file::TensorFile;
use crate::read::source::{Backend, open_regular_in};
use crate::sys::directory::{Directory, identity, open_parent};

/// A name in a directory, and the file that it led to.
#[derive(Debug)]
pub(super) struct Entry {
    /// For errors.
    pub(super) path: PathBuf,
    pub(super) directory: Arc<Directory>,
    pub(super) name: OsString,
    /// The file or the symbolic link that has the name.
    link: File,
    pub(super) is_link: bool,
    /// Of the file, before its header was read.
    pub(super) before: Metadata,
}

impl Entry {
    /// Opens the file at `path` and validates its header.
    pub(super) fn open(path: &Path) -> Result<(Entry, TensorFile)> {
        let fail = |source| Error::io("open", path, source);
        let (directory, name) = open_parent(path, "open")?;
        let link = directory.open_entry(&name).map_err(fail)?;
        let link = link.ok_or_else(|| fail(io::Error::from_raw_os_error(libc::ENOENT)))?;
        let opened = open_regular_in(&directory, &name, path)?;
        // Taken before the header is read, so that every later change is found.
        let before = opened.0.metadata().map_err(|source| Error::io("inspect", path, source))?;
        let source = TensorFile::from_file(opened, path, Backend::Pread)?;
        let is_link = link.metadata().map_err(fail)?.is_symlink();
        let directory = Arc::new(directory);
        Ok((Entry { path: path.to_path_buf(), directory, name, link, is_link, before }, source))
    }

    /// Refuses if the name leads to another file now, or the file has changed.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let now = || {
            let is_link =
                |now: File| io::Result::Ok(identity(&now.metadata()?) == identity(&self.link.metadata()?));
            let is_same = self.directory.open_entry(&self.name)?.map_or(Ok(false), is_link)?;
            let file = self.directory.open_link_target(&self.name)?.filter(|_| is_same);
            file.map(|file| file.metadata()).transpose()
        };
        self.check_metadata(now())
    }

    /// Refuses if `now`, the file's present metadata, shows that it was replaced, removed (`None`) or written to. A later
    /// change is not detected.
    pub(super) fn check_metadata(&self, now: io::Result<Option<Metadata>>) -> Result<()> {
        let stamp = |of: &Metadata| (of.dev(), of.ino(), of.len(), of.mtime(), of.mtime_nsec());
        match now.map_err(|error| Error::io("inspect", &self.path, error))? {
            Some(now) if stamp(&now) == stamp(&self.before) => Ok(()),
            _ => {
                let detail = "the file was replaced, removed or written to while its metadata was edited, and stays as \
                              that left it: run the edit again";
                Err(Error::new(ErrorKind::FileChanged, detail).in_file(&self.path))
            }
        }
    }
}
