//! Writes a file so that nobody ever sees half of it: beside the target first, then renamed over it.
//!
//! `target` says what is at the place to be saved to, `output` writes a file there, or, with `direct`, to a pipe or a
//! device. `staging` makes and names the file beside the target, `attributes` gives it the target's owner, permissions
//! and space, `acl` its access control list, `vectored` and `file_copy` fill it, `write_back` puts the data on the disk
//! before a file is replaced, `release` lets go of the file that it replaces, `strays` removes what saves that were
//! killed have left, `filesystem` says whether other machines can have it, `fallbacks` copies where a link or a rename is
//! impossible, as `docs/saving.md` describes, unless `mapped` says that this process would see it. Nothing here knows of
//! headers and tensors.

mod acl;
pub(crate) mod attributes;
mod deferred_close;
mod fallbacks;
mod file_copy;
mod leftovers;
mod staging;

pub(crate) use attributes::Attributes;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::sys::directory::Directory;
use crate::sys::directory::open_parent;
use crate::sys::fork::OwnerProcess;
use crate::sys::signals::block_write_signals;
use crate::write::target::Target;
use crate::write::vectored;
use crate::write::write_back::{self, Appender};
use staging::{Purpose, Staging};

/// A file that is being written, and is there under its name only once [`AtomicFile::commit`] has returned.
///
/// Dropped before that, it leaves the target as it was and nothing beside it. It is for the process that began it: one
/// that is forked meanwhile can neither go on with it nor take anything away. It will be in the directory that its path
/// led to when it was begun, whatever the path leads to later.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    /// What the caller named; for the errors.
    path: PathBuf,
    directory: Arc<Directory>,
    /// The target's name in the directory.
    name: OsString,
    staging: Staging,
    /// Those of the target when the file was begun, in case that it is gone when it is put there.
    attributes: Option<Attributes>,
    process: OwnerProcess,
    /// Whether something at its name, or beside it, goes once it is in place, so that its data has to be on the disk by
    /// then.
    replaces: bool,
    /// The bytes that were appended.
    length: u64,
    /// Whether what was written was put on the disk, as a copy of it will have to be.
    is_synchronized: AtomicBool,
    /// Whether the target, which could not be renamed over, has lost its old contents.
    has_overwritten: bool,
}

impl AtomicFile {
    /// Begins a file of exactly `length` bytes that will be at `path`. A symbolic link there is replaced, and what it
    /// leads to stays as it is. The file gets the permissions that the target, or what a link leads to, has at the
    /// commit, and its owner and group if the process may; a new one gets those of every new file.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): no such directory, no permission, no space for `length` bytes;
    /// `EISDIR` if the target is a directory, `ENODEV` if it is a pipe, a device or a descriptor.
    pub fn create(path: &Path, length: u64) -> Result<AtomicFile> {
        let (directory, name) = open_parent(path, "create")?;
        AtomicFile::create_in(Arc::new(directory), name, path, length)
    }

    /// As [`AtomicFile::create`], for the file `name` in a directory that is held already. `path` is for the errors.
    pub(crate) fn create_in(
        directory: Arc<Directory>,
        name: OsString,
        path: &Path,
        length: u64,
    ) -> Result<AtomicFile> {
        let fail = |source| Error::io("create", path, source);
        let refuse = |errno| Err(fail(io::Error::from_raw_os_error(errno)));
        match Target::find(&directory, &name).map_err(fail)? {
            Target::Replaced => {}
            Target::Refused(errno) => return refuse(errno),
            Target::Special(_) => return refuse(libc::ENODEV),
            Target::Descriptor(_) | Target::Foreign => {
                return refuse(libc::ENODEV).map_err(|error: Error| {
                    error.with_remedy(
                        "it stands for an open file, which cannot be replaced: name the file itself",
                    )
                });
            }
        }
        let attributes = Attributes::at(&directory, &name).map_err(fail)?;
        let mode = staging::mode_of(attributes.is_some());
        let (file, staging) = staging::stage(&directory, mode).map_err(fail)?;
        leftovers::clear(&directory, &file);
        // From here on, dropping `staged` removes what was staged.
        let staged = AtomicFile {
            file,
            path: path.to_path_buf(),
            directory,
            name,
            staging,
            replaces: attributes.is_some(),
            attributes,
            process: OwnerProcess::current(),
            length: 0,
            is_synchronized: AtomicBool::default(),
            has_overwritten: false,
        };
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
        let written = block_write_signals(|| {
            if self.replaces {
                vectored::write_all(&mut Appender::new(&mut self.file, &mut self.length), pieces)
            } else {
                vectored::write_all(&mut self.file, pieces)
            }
        });
        written.map_err(|source| Error::io("write", &self.path, source))
    }

    /// Writes `bytes` at `offset`, whatever was appended before. Several threads may do so at once.
    ///
    /// # Errors
    ///
    /// As [`AtomicFile::write`].
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.check_process()?;
        let written = block_write_signals(|| {
            if self.replaces {
                write_back::write_all_at(&self.file, bytes, offset)
            } else {
                self.file.write_all_at(bytes, offset)
            }
        });
        written.map_err(|source| Error::io("write", &self.path, source))
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
        let copied = block_write_signals(|| file_copy::append(&mut self.file, source, offset, length));
        let copied = copied.map_err(|failure| match failure {
            file_copy::Failure::Read(source) => Error::io("read", path, source),
            file_copy::Failure::Write(source) => Error::io("write", &self.path, source),
        })?;
        if self.replaces {
            Appender::new(&mut self.file, &mut self.length).appended(copied);
        }
        Ok(copied)
    }

    /// Puts the data on the disk early, because something else goes once the file is in place. To be called before the
    /// first write.
    pub(crate) fn mark_replacing(&mut self) {
        self.replaces = true;
    }

    /// Puts the data on the disk, but not the size of the file nor where its data is: those come with its name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub(crate) fn write_back(&self) -> Result<()> {
        if self.is_synchronized.load(Ordering::Relaxed) {
            return Ok(());
        }
        write_back::finish(&self.file).map_err(|source| Error::io("write", &self.path, source))
    }

    /// Has what is written so far put on the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io); [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in
    /// another process.
    pub fn synchronize(&self) -> Result<()> {
        self.check_process()?;
        self.inherit().map_err(|source| Error::io("write", &self.path, source))?;
        self.file.sync_all().map_err(|source| Error::io("write", &self.path, source))?;
        self.is_synchronized.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Asks whether the filesystem has taken what was written, as [`AtomicFile::commit`] does too.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn check_deferred_errors(&self) -> Result<()> {
        check_deferred_errors(&self.file).map_err(|source| Error::io("write", &self.path, source))
    }

    /// Puts the file where the target was. With `durable`, returns once file and directory entry are on the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io). The target is then as it was, with two exceptions: it could only be
    /// overwritten in place, and that failed half-way (the error then names the complete new file); or all is done
    /// but for the directory entry, which could not be synchronized. And
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in another process.
    pub fn commit(mut self, durable: bool) -> Result<()> {
        self.try_commit(durable)
    }

    /// As [`AtomicFile::commit`], once; afterwards [`AtomicFile::has_overwritten`] tells more.
    pub(crate) fn try_commit(&mut self, durable: bool) -> Result<()> {
        self.commit_if(durable, || Ok(()))
    }

    /// Whether a commit that failed took the target's old contents, as it could not be renamed over.
    pub(crate) fn has_overwritten(&self) -> bool {
        self.has_overwritten
    }

    /// As [`AtomicFile::commit`], unless `check` has an error for what is at the target in the moment before the file
    /// is put there; it may be called twice.
    pub(crate) fn commit_if(&mut self, durable: bool, check: impl Fn() -> Result<()>) -> Result<()> {
        self.check_process()?;
        if durable {
            self.synchronize()?;
        }
        self.check_deferred_errors()?;
        if self.replaces {
            self.write_back()?;
        }
        match self.put_in_place(check)? {
            Some(refusal) => block_write_signals(|| self.overwrite_in_place(&refusal, durable)),
            None if durable => self.synchronize_directory(),
            None => Ok(()),
        }
    }

    /// Refuses a process that was forked from the one that began the file.
    fn check_process(&self) -> Result<()> {
        self.process.check("save").map_err(|error| error.in_file(&self.path))
    }

    /// Gives the file the attributes that the target has now, or, if it is gone, had when the file was begun; returns
    /// whether that has changed the file.
    fn inherit(&self) -> io::Result<bool> {
        let now = Attributes::at(&self.directory, &self.name)?;
        let attributes = now.as_ref().or(self.attributes.as_ref());
        attributes.map_or(Ok(false), |attributes| attributes.inherit(&self.file))
    }

    /// The same, for a file that may have been synchronized; then asks `check`.
    fn inherit_if(&self, check: impl Fn() -> Result<()>) -> Result<()> {
        let fail = |source| Error::io("write", &self.path, source);
        if self.inherit().map_err(fail)? && self.is_synchronized.load(Ordering::Relaxed) {
            self.file.sync_all().map_err(fail)?;
        }
        check()
    }

    /// Links or renames the staged file to the target; returns what was refused if the target can only be overwritten.
    fn put_in_place(&mut self, check: impl Fn() -> Result<()>) -> Result<Option<io::Error>> {
        self.inherit_if(&check)?;
        if matches!(self.staging, Staging::Unnamed) {
            // If nothing is at the target, the link is the commit.
            match self.directory.link(&self.file, &self.name) {
                Ok(()) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(refusal) => block_write_signals(|| self.copy_beside(&refusal))?,
            }
        }
        let fail = |source| Error::io("write", &self.path, source);
        // Before the last look at the target, as it takes a while.
        self.write_back()?;
        let old = deferred_close::keep_open(self.directory.open_entry(&self.name).map_err(fail)?);
        self.inherit_if(&check)?;
        if matches!(self.staging, Staging::Unnamed) {
            // From here to the rename nothing is allocated: a process that has no memory left for that ends, and would
            // leave the name.
            match staging::link_beside(&self.file, &self.directory) {
                Ok(name) => self.staging = Staging::Named(name),
                Err(refusal) => {
                    block_write_signals(|| self.copy_beside(&refusal))?;
                    self.write_back()?;
                    self.inherit_if(&check)?;
                }
            }
        }
        let Staging::Named(name) = &self.staging else { return Ok(None) };
        match self.directory.rename(name, &self.name) {
            Ok(()) => {
                deferred_close::close_later(old);
                leftovers::disclaim(&self.file);
                self.staging = Staging::InPlace;
                Ok(None)
            }
            Err(error) if fallbacks::cannot_rename(&error, &self.directory) => Ok(Some(error)),
            Err(error) => Err(Error::io("write", &self.path, error)),
        }
    }

    /// Has the target's entry in its directory put on the disk.
    fn synchronize_directory(&self) -> Result<()> {
        self.directory.synchronize().map_err(|source| {
            Error::io("synchronize the directory of", &self.path, source).with_remedy(
                "the new file is in place and complete, but after a loss of power what was there before may be back: save it \
                 again",
            )
        })
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        let Staging::Named(name) = &self.staging else { return };
        if self.process.is_current() {
            // There is nobody left to tell; the error that led here is already on its way.
            let _ = self.directory.remove(name);
        }
    }
}

/// Asks whether the filesystem has taken what was written: some, as those of a network, only say so when a descriptor
/// is closed, which has to be another one here, as the file gets its name by its own.
pub(crate) fn check_deferred_errors(file: &File) -> io::Result<()> {
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

/// Renames the file `name` to a fresh name, which is hidden, and returns that.
pub(crate) fn set_aside(directory: &Directory, name: &OsStr) -> io::Result<OsString> {
    staging::set_aside(directory, name, Purpose::Old)
}

/// Sets aside the blocks of a file of `length` bytes.
fn reserve(file: &File, length: u64) -> io::Result<()> {
    let reserve = || block_write_signals(|| attributes::reserve(file, length));
    let reserved = reserve();
    // The space that is missing may be that of a file that was replaced just now.
    if is_full(&reserved) && deferred_close::wait() { reserve() } else { reserved }
}

/// Whether there was not enough space.
fn is_full(outcome: &io::Result<()>) -> bool {
    let full = [libc::ENOSPC, libc::EDQUOT];
    outcome.as_ref().is_err_and(|error| error.raw_os_error().is_some_and(|number| full.contains(&number)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// A file that was begun, with a name of its own beside the target, in `process`.
    fn begun(directory: &tempfile::TempDir, process: OwnerProcess) -> (AtomicFile, PathBuf) {
        let (target, name) = (directory.path().join("target"), directory.path().join("staged"));
        let directory = Arc::new(Directory::open(directory.path()).expect("opened"));
        let begun = AtomicFile {
            file: File::create(&name).expect("a file"),
            path: target,
            directory,
            name: "target".into(),
            staging: Staging::Named("staged".into()),
            attributes: None,
            process,
            replaces: false,
            length: 0,
            is_synchronized: AtomicBool::default(),
            has_overwritten: false,
        };
        (begun, name)
    }

    #[test]
    fn what_was_begun_is_taken_away() {
        let directory = tempfile::tempdir().expect("a directory");
        let (file, name) = begun(&directory, OwnerProcess::current());
        drop(file);
        assert!(!name.exists());
    }

    #[test]
    fn another_process_neither_goes_on_nor_takes_anything_away() {
        let directory = tempfile::tempdir().expect("a directory");
        let (mut file, name) = begun(&directory, OwnerProcess::other());
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
        assert!(name.exists() && !directory.path().join("target").exists());
        assert_eq!(name.metadata().expect("staged").len(), 0);
    }
}
