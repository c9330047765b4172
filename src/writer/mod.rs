//! Writes a file so that nobody ever sees half of it: beside the target first, then renamed over it.
//!
//! `staging` makes and names the file beside the target, `attributes` gives it the target's owner, permissions and
//! space, `vectored` and `file_copy` fill it, `release` lets go of the file that it replaces, `strays` removes what
//! saves that were killed have left, `filesystem` says whether other machines can have it, `fallbacks` copies where a
//! link or a rename is impossible, as `docs/saving.md` describes. Nothing here knows of headers and tensors.

mod attributes;
mod fallbacks;
mod file_copy;
mod filesystem;
mod release;
mod staging;
mod strays;
mod vectored;

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::process::Process;
use crate::source::bad_path;
use staging::{Purpose, Staging};

/// A file that is being written, and is there under its name only once [`AtomicFile::commit`] has returned.
///
/// Dropped before that, it leaves the target as it was and nothing beside it. It is for the process that began it: one
/// that is forked meanwhile can neither go on with it nor take anything away.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    /// What the caller named; for the errors.
    path: PathBuf,
    /// `path` with its symbolic links followed.
    target: PathBuf,
    staging: Staging,
    process: Process,
    /// Whether what was written was put on the disk, as a copy of it will have to be.
    is_synchronized: AtomicBool,
    /// Whether the target, which could not be renamed over, has lost its old contents.
    has_overwritten: bool,
}

impl AtomicFile {
    /// Begins a file of exactly `length` bytes that will be at `path`. A symbolic link is followed; an existing file's
    /// permissions (and its owner and group, where the process may) are taken over, a new one gets those of the umask.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): no such directory, no permission, no space for `length` bytes, the
    /// target is a directory.
    pub fn create(path: &Path, length: u64) -> Result<AtomicFile> {
        let fail = |source| Error::io("create", path, source);
        let existing = look(path)?;
        if let Some(metadata) = &existing {
            let kind = metadata.file_type();
            if kind.is_fifo() || kind.is_char_device() {
                let file = OpenOptions::new().write(true).open(path).map_err(fail)?;
                return Ok(AtomicFile::new(file, path, path.to_path_buf(), Staging::Direct));
            }
        }
        let target = staging::follow_links(path).map_err(fail)?;
        AtomicFile::begin(path, target, existing, length)
    }

    /// As [`AtomicFile::create`], for bytes that come in any order: a pipe or a device, which could not take them so,
    /// is refused.
    ///
    /// # Errors
    ///
    /// As [`AtomicFile::create`], and `ENODEV` for what is no regular file.
    pub fn create_regular(path: &Path, length: u64) -> Result<AtomicFile> {
        let existing = look(path)?;
        let target = staging::follow_links(path).map_err(|source| Error::io("create", path, source))?;
        AtomicFile::begin(path, target, existing, length)
    }

    /// As [`AtomicFile::create`], but the entry at `path` itself is replaced: a symbolic link is not followed, so that
    /// what it points to stays as it is; a pipe or a device is refused.
    ///
    /// # Errors
    ///
    /// As [`AtomicFile::create`].
    pub fn create_entry(path: &Path, length: u64) -> Result<AtomicFile> {
        let existing = match std::fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_symlink() => None,
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("create", path, error)),
        };
        AtomicFile::begin(path, path.to_path_buf(), existing, length)
    }

    fn new(file: File, path: &Path, target: PathBuf, staging: Staging) -> AtomicFile {
        AtomicFile {
            file,
            path: path.to_path_buf(),
            target,
            staging,
            process: Process::current(),
            is_synchronized: AtomicBool::default(),
            has_overwritten: false,
        }
    }

    /// Begins the file that will be at `target`, where there is `existing` now.
    fn begin(path: &Path, target: PathBuf, existing: Option<Metadata>, length: u64) -> Result<AtomicFile> {
        let fail = |source| Error::io("create", path, source);
        if let Some(kind) = existing.as_ref().map(Metadata::file_type).filter(|kind| !kind.is_file()) {
            let errno = if kind.is_dir() { libc::EISDIR } else { libc::ENODEV };
            return Err(fail(io::Error::from_raw_os_error(errno)));
        }
        let (file, staging) = staging::stage(&target, existing.is_some()).map_err(fail)?;
        strays::clear(staging::directory_of(&target), &file);
        // From here on, dropping `staged` removes what was staged.
        let staged = AtomicFile::new(file, path, target, staging);
        if let Some(metadata) = &existing {
            attributes::take_over(&staged.file, metadata).map_err(fail)?;
        }
        reserve(&staged.file, length).map_err(|source| Error::io("reserve space for", path, source))?;
        Ok(staged)
    }

    /// Appends `pieces`, many with one system call, straight from where they are.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): no space left, or whatever else the system refuses;
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in another process.
    pub fn write<'a>(&mut self, pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
        self.check_process()?;
        vectored::write_all(&mut self.file, pieces).map_err(|source| Error::io("write", &self.path, source))
    }

    /// Writes `bytes` at `offset`, whatever was appended before. Several threads may do so at once.
    ///
    /// # Errors
    ///
    /// As [`AtomicFile::write`].
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.check_process()?;
        self.file.write_all_at(bytes, offset).map_err(|source| Error::io("write", &self.path, source))
    }

    /// Appends bytes of the file `source`, which was opened by `path`, from `offset` on: some, but no more than
    /// `length`. They come into this process's memory only where the kernel cannot copy them by itself. Gives their
    /// number: 0 where `source` has no more.
    ///
    /// # Errors
    ///
    /// As [`AtomicFile::write`], and where `source` cannot be read.
    pub fn copy_from(&mut self, source: &File, path: &Path, offset: u64, length: u64) -> Result<u64> {
        self.check_process()?;
        file_copy::append(&mut self.file, source, offset, length).map_err(|failure| match failure {
            file_copy::Failure::Read(source) => Error::io("read", path, source),
            file_copy::Failure::Write(source) => Error::io("write", &self.path, source),
        })
    }

    /// Has what is written so far put on the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io); [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in
    /// another process.
    pub fn synchronize(&self) -> Result<()> {
        self.check_process()?;
        if matches!(self.staging, Staging::Direct) {
            return Ok(());
        }
        self.file.sync_all().map_err(|source| Error::io("write", &self.path, source))?;
        self.is_synchronized.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Asks whether the filesystem has taken what was written, as [`AtomicFile::commit`] does too.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn hear_of_writes(&self) -> Result<()> {
        hear_of_writes(&self.file).map_err(|source| Error::io("write", &self.path, source))
    }

    /// Puts the file where the target was. With `sync`, returns once file and directory entry are on the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io). The target is then as it was, with two exceptions: it could only be
    /// overwritten in place, and that failed half-way (the error then names the complete new file); or all is done
    /// but for the directory entry, which could not be synchronized. And
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in another process.
    pub fn commit(mut self, sync: bool) -> Result<()> {
        self.try_commit(sync)
    }

    /// As [`AtomicFile::commit`], once; afterwards [`AtomicFile::has_overwritten`] tells more.
    pub(crate) fn try_commit(&mut self, sync: bool) -> Result<()> {
        self.commit_if(sync, |_| Ok(()))
    }

    /// Whether a commit that failed took the target's old contents, as it could not be renamed over.
    pub(crate) fn has_overwritten(&self) -> bool {
        self.has_overwritten
    }

    /// As [`AtomicFile::commit`], unless `check` has an error for what is at the target in the moment before the file
    /// is put there; it is given the target, which is no symbolic link, and may be called twice.
    pub(crate) fn commit_if(&mut self, sync: bool, check: impl Fn(&Path) -> Result<()>) -> Result<()> {
        self.check_process()?;
        if matches!(self.staging, Staging::Direct) {
            return Ok(());
        }
        if sync {
            self.synchronize()?;
        }
        self.hear_of_writes()?;
        match self.put_in_place(check)? {
            Some(refusal) => self.overwrite_in_place(&refusal, sync),
            None if sync => sync_directory_of(&self.path, &self.target),
            None => Ok(()),
        }
    }

    /// Refuses a process that was forked from the one that began the file.
    fn check_process(&self) -> Result<()> {
        self.process.check("save").map_err(|error| error.in_file(&self.path))
    }

    /// Links or renames the staged file to the target; where only overwriting that is left, gives what was refused.
    fn put_in_place(&mut self, check: impl Fn(&Path) -> Result<()>) -> Result<Option<io::Error>> {
        check(&self.target)?;
        if matches!(self.staging, Staging::Unnamed) {
            // Nothing at the target: the link is the commit.
            let linked = match staging::link_unnamed(&self.file, &self.target) {
                Ok(()) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    staging::link_beside(&self.file, &self.target)
                }
                Err(error) => Err(error),
            };
            match linked {
                Ok(name) => self.staging = Staging::Named(name),
                Err(refusal) => self.copy_beside(&refusal)?,
            }
            check(&self.target)?;
        }
        let Staging::Named(name) = &self.staging else { return Ok(None) };
        let old = release::hold(&self.target);
        match std::fs::rename(name, &self.target) {
            Ok(()) => {
                release::let_go(old);
                strays::disclaim(&self.file);
                self.staging = Staging::Direct;
                Ok(None)
            }
            Err(error) if fallbacks::cannot_rename(&error, &self.target) => Ok(Some(error)),
            Err(error) => Err(Error::io("write", &self.path, error)),
        }
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        let Staging::Named(name) = &self.staging else { return };
        if self.process.is_current() {
            // There is nobody left to tell; the error that led here is already on its way.
            let _ = std::fs::remove_file(name);
        }
    }
}

/// Asks whether the filesystem has taken what was written: some, as those of a network, only say so when a descriptor
/// is closed, which has to be another one here, as the file gets its name by its own.
pub(crate) fn hear_of_writes(file: &File) -> io::Result<()> {
    let descriptor = file.try_clone()?.into_raw_fd();
    // SAFETY: the descriptor was made above, and nothing else has it.
    match unsafe { libc::close(descriptor) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // The descriptor is closed all the same, and nothing was said of the data.
            error if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            error => Err(error),
        },
    }
}

fn sync_directory_of(path: &Path, target: &Path) -> Result<()> {
    staging::sync_directory(target).map_err(|source| {
        Error::io("synchronize the directory of", path, source).with_remedy(
            "the new file is in place and complete, but after a loss of power what was there before may be back: save it \
             again",
        )
    })
}

/// Has the entries of `folder` put on the disk.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    staging::sync_folder(folder).map_err(|source| Error::io("synchronize the folder", folder, source))
}

/// Renames what is at `path` to a fresh name beside it, which is hidden, and gives that.
pub(crate) fn set_aside(path: &Path) -> Result<PathBuf> {
    staging::set_aside(path, Purpose::Old).map_err(|source| Error::io("rename", path, source))
}

/// Sets aside the blocks of a file of `length` bytes.
fn reserve(file: &File, length: u64) -> io::Result<()> {
    let reserved = attributes::reserve(file, length);
    // The space that is missing may be that of a file that was replaced just now.
    if is_full(&reserved) && release::wait() { attributes::reserve(file, length) } else { reserved }
}

/// Whether there was not enough space.
fn is_full(outcome: &io::Result<()>) -> bool {
    let full = [libc::ENOSPC, libc::EDQUOT];
    outcome.as_ref().is_err_and(|error| error.raw_os_error().is_some_and(|number| full.contains(&number)))
}

/// What is at a `path` that can be one of a file, links followed: asked of the path itself, as the links under /proc
/// that name a pipe lead to no path.
fn look(path: &Path) -> Result<Option<Metadata>> {
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(bad_path(path));
    }
    let fail = |source| Error::io("create", path, source);
    if path.as_os_str().is_empty() {
        return Err(fail(io::Error::from_raw_os_error(libc::ENOENT)));
    }
    existing(path).map_err(fail)
}

/// What is at `path`, links followed; `None` if there is nothing.
fn existing(path: &Path) -> io::Result<Option<Metadata>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// A file that was begun, with a name of its own beside the target, in `process`.
    fn begun(folder: &tempfile::TempDir, process: Process) -> (AtomicFile, PathBuf) {
        let (target, name) = (folder.path().join("target"), folder.path().join("staged"));
        let file = File::create(&name).expect("a file");
        let staging = Staging::Named(name.clone());
        let mut begun = AtomicFile::new(file, &target.clone(), target, staging);
        begun.process = process;
        (begun, name)
    }

    #[test]
    fn what_was_begun_is_taken_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, name) = begun(&folder, Process::current());
        drop(file);
        assert!(!name.exists());
    }

    #[test]
    fn another_process_neither_goes_on_nor_takes_anything_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut file, name) = begun(&folder, Process::other());
        let source = tempfile::tempfile().expect("a file");
        source.write_all_at(b"bytes", 0).expect("written");
        for outcome in [
            file.write([&b"bytes"[..]]),
            file.write_at(b"bytes", 0),
            file.copy_from(&source, Path::new("source"), 0, 5).map(|_| ()),
            file.synchronize(),
        ] {
            let error = outcome.expect_err("another process");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains("target: this save was begun by process"), "{error}");
        }
        file.commit(false).expect_err("another process");
        assert!(name.exists() && !folder.path().join("target").exists());
        assert_eq!(name.metadata().expect("staged").len(), 0);
    }
}
