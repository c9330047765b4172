//! The file that is written beside its target and renamed over it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::staging::{Location, StagedFile, link_beside, rename_to_number};
use super::{deferred_close, fallbacks, file_copy, leftovers};
use crate::error::{Error, Result};
use crate::sys::directory::{Directory, open_parent};
use crate::sys::raw_bytes::{self, RawBytes};
use crate::sys::signals::block_write_signals;
use crate::write::target::Target;
use crate::write::vectored;
use crate::write::write_back::{self, Appender};

/// A file that appears under its name only once [`AtomicFile::commit`] has returned.
///
/// Dropped before that, it leaves the target as it was and nothing beside it. It belongs to the process that created it:
/// a forked child can neither write nor remove it. It is placed in the directory that its path led to when it was
/// created, whatever the path leads to later.
#[derive(Debug)]
pub struct AtomicFile {
    staged: StagedFile,
    /// Whether the commit removes another file, so that this file's data must be on the disk before.
    replaces: bool,
    /// The bytes that were appended.
    length: u64,
    /// The bytes that the file will have.
    complete_length: u64,
}

impl AtomicFile {
    /// Creates a file of exactly `length` bytes that will be at `path`. A symbolic link there is replaced, and the file
    /// it leads to stays as it is. The new file gets the owner, group and permissions that the target, or what a link
    /// leads to, has at the commit, as far as the process may set them; without a target, those of every new file.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): no such directory, no permission, no space for `length` bytes;
    /// `EISDIR` if the target is a directory, `ENODEV` if it is a pipe, a device or a descriptor.
    ///
    /// ```
    /// # fn main() -> safetensors_torch::Result<()> {
    /// use safetensors_torch::AtomicFile;
    ///
    /// let path = std::env::temp_dir().join(format!("doc-atomic-{}", std::process::id()));
    /// let mut file = AtomicFile::create(&path, 5)?;
    /// file.write([&b"hel"[..], b"lo"])?;
    /// assert!(!path.exists());
    /// file.commit(false)?;
    /// assert_eq!(std::fs::read(&path).expect("committed"), b"hello");
    /// # std::fs::remove_file(&path).expect("removed");
    /// # Ok(())
    /// # }
    /// ```
    pub fn create(path: &Path, length: u64) -> Result<AtomicFile> {
        let (directory, name) = open_parent(path, "create")?;
        AtomicFile::create_in(Arc::new(directory), name, path, length)
    }

    /// As [`AtomicFile::create`], for the file `name` in an open directory. Errors name `path`.
    pub(crate) fn create_in(
        directory: Arc<Directory>,
        name: OsString,
        path: &Path,
        length: u64,
    ) -> Result<AtomicFile> {
        let fail = |source| Error::io("create", path, source);
        let refusal = |errno| fail(io::Error::from_raw_os_error(errno));
        match Target::find(&directory, &name).map_err(fail)? {
            Target::Replaced => {}
            Target::Refused(errno) => return Err(refusal(errno)),
            Target::Special(_) => return Err(refusal(libc::ENODEV)),
            Target::Descriptor(_) | Target::Foreign => {
                let remedy = "it stands for an open file, which cannot be replaced: name the file itself";
                return Err(refusal(libc::ENODEV).with_remedy(remedy));
            }
        }
        let staged = StagedFile::create(directory, name, path).map_err(fail)?;
        leftovers::remove_leftovers(&staged.directory, &staged.file);
        let file =
            AtomicFile { replaces: staged.attributes.is_some(), staged, length: 0, complete_length: length };
        file.reserve(length)?;
        Ok(file)
    }

    /// Appends `pieces` without copying them first, many with one system call.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): no space left, or another system error;
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in another process.
    pub fn write<'a>(&mut self, pieces: impl IntoIterator<Item = impl Into<RawBytes<'a>>>) -> Result<()> {
        self.staged.check_process()?;
        let written = block_write_signals(|| {
            if self.replaces {
                let mut appender = Appender::new(&self.staged.file, &mut self.length);
                vectored::write_all(pieces, |pieces| appender.write(pieces))
            } else {
                vectored::write_all(pieces, |pieces| raw_bytes::write(&self.staged.file, pieces))
            }
        });
        written.map_err(|source| self.staged.fail(source))
    }

    /// Writes `bytes` at `offset`, whatever was appended before. Several threads may call this at once.
    ///
    /// # Errors
    ///
    /// As [`AtomicFile::write`].
    pub fn write_at<'a>(&self, bytes: impl Into<RawBytes<'a>>, offset: u64) -> Result<()> {
        let bytes = bytes.into();
        self.staged.check_process()?;
        let written = block_write_signals(|| {
            if self.replaces {
                write_back::write_all_at(&self.staged.file, bytes, offset)
            } else {
                raw_bytes::write_all_at(&self.staged.file, bytes, offset)
            }
        });
        written.map_err(|source| self.staged.fail(source))
    }

    /// Appends up to `length` bytes of the file `source`, from `offset` on; returns their number, 0 at the end of
    /// `source`. The kernel copies them if it can. Moves the position of `source`.
    ///
    /// # Errors
    ///
    /// As [`AtomicFile::write`]; `source` cannot be read.
    pub fn copy_from(&mut self, source: &File, offset: u64, length: u64) -> Result<u64> {
        self.staged.check_process()?;
        let copied = block_write_signals(|| file_copy::append(&mut self.staged.file, source, offset, length));
        let copied = copied.map_err(|source| self.staged.fail(source))?;
        if self.replaces {
            Appender::new(&self.staged.file, &mut self.length).appended(copied);
        }
        Ok(copied)
    }

    /// Appends `length` bytes of `source`, from `offset` on, by sharing their blocks; returns `false` if the filesystem
    /// cannot. The conditions are those of [`file_copy::share`].
    pub(crate) fn share_from(&mut self, source: &File, offset: u64, length: u64) -> Result<bool> {
        self.staged.check_process()?;
        let shared = block_write_signals(|| file_copy::share(&mut self.staged.file, source, offset, length));
        if shared.is_ok() {
            self.length += length;
        }
        Ok(shared.is_ok())
    }

    /// Gives the staged file a hidden name, so that other processes can open it as a [`JoinedFile`](crate::JoinedFile).
    /// Returns its path: the target's directory, as [`AtomicFile::create`] got it, and the hidden name. What was written
    /// before is visible to processes on other machines too.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io); [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in
    /// another process.
    pub fn make_joinable(&mut self) -> Result<PathBuf> {
        self.give_name()?;
        Ok(self.staged.path.with_file_name(self.hidden_name()))
    }

    /// As [`AtomicFile::make_joinable`], with a hidden name that this process determines by `number`: processes that know it
    /// can join a later save too. Returns the hidden name.
    #[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only Python caches plans"))]
    pub(crate) fn make_joinable_as(&mut self, number: u64) -> Result<&OsStr> {
        self.give_name()?;
        let renamed = rename_to_number(&self.staged.directory, self.hidden_name(), number);
        let name = renamed.map_err(|source| {
            let taken = source.kind() == io::ErrorKind::AlreadyExists;
            let error = self.staged.fail(source);
            if taken {
                error.with_remedy("another save with this plan is in progress: wait for its end")
            } else {
                error
            }
        })?;
        self.staged.location = Location::Named(name);
        Ok(self.hidden_name())
    }

    fn hidden_name(&self) -> &OsStr {
        match &self.staged.location {
            Location::Named(name) => name,
            _ => unreachable!("`give_name` was called, and a commit consumes the file"),
        }
    }

    fn give_name(&mut self) -> Result<()> {
        self.staged.check_process()?;
        if matches!(self.staged.location, Location::Unnamed) {
            match link_beside(&self.staged.file, &self.staged.directory) {
                Ok(name) => self.staged.location = Location::Named(name),
                Err(refusal) => {
                    block_write_signals(|| fallbacks::copy_beside(&mut self.staged, &refusal))?;
                }
            }
        }
        // The space is reserved, but the others expect a file of its full length.
        self.staged.file.set_len(self.complete_length).map_err(|source| self.staged.fail(source))?;
        // Sends the bytes to the server, for processes on other machines.
        self.check_deferred_errors()
    }

    pub(crate) fn reserve(&self, length: u64) -> Result<()> {
        deferred_close::reserve(&self.staged.file, length)
            .map_err(|source| Error::io("reserve space for", &self.staged.path, source))
    }

    /// Declares that the commit makes another file obsolete, so that the data is written back as it is written. To be
    /// called before the first write.
    pub(crate) fn mark_replacing(&mut self) {
        self.replaces = true;
    }

    /// Writes the data to the disk, but not the file's size and block map: those follow with its name.
    pub(crate) fn write_back(&self) -> Result<()> {
        self.staged.write_back()
    }

    /// Writes the file to the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io); [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) in
    /// another process.
    pub fn synchronize(&self) -> Result<()> {
        self.staged.check_process()?;
        self.staged.synchronize().map_err(|source| self.staged.fail(source))
    }

    /// Returns the errors of earlier writes that the filesystem has kept until now. [`AtomicFile::commit`] does so too.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn check_deferred_errors(&self) -> Result<()> {
        write_back::check_deferred_errors(&self.staged.file).map_err(|source| self.staged.fail(source))
    }

    /// Puts the file in the target's place. With `durable`, returns once file and directory entry are on the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io). The target is then as it was, with two exceptions. It could only be
    /// overwritten in place, and that failed half-way: the error names the complete new file. Or the file is in place,
    /// but its directory entry could not be synchronized. [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument)
    /// in another process.
    pub fn commit(mut self, durable: bool) -> Result<()> {
        self.commit_if(durable, || Ok(()))
    }

    /// Whether a failed commit has destroyed the target's old contents, because it had to be overwritten in place.
    pub(crate) fn has_overwritten(&self) -> bool {
        self.staged.has_overwritten
    }

    /// As [`AtomicFile::commit`], unless `check` returns an error right before the file is put in place. `check` may be
    /// called twice.
    pub(crate) fn commit_if(&mut self, durable: bool, check: impl Fn() -> Result<()>) -> Result<()> {
        self.staged.check_process()?;
        if durable {
            self.synchronize()?;
        }
        self.check_deferred_errors()?;
        if self.replaces {
            self.write_back()?;
        }
        match self.put_in_place(check)? {
            Some(refusal) => {
                block_write_signals(|| fallbacks::overwrite_in_place(&mut self.staged, &refusal, durable))
            }
            None if durable => self.staged.synchronize_directory(),
            None => Ok(()),
        }
    }

    /// Links or renames the staged file to the target. Returns the system's error if the target can only be overwritten
    /// in place.
    fn put_in_place(&mut self, check: impl Fn() -> Result<()>) -> Result<Option<io::Error>> {
        let staged = &mut self.staged;
        staged.inherit_attributes_if(&check)?;
        if matches!(staged.location, Location::Unnamed) {
            // Without a target, the link is the commit.
            match staged.directory.link(&staged.file, &staged.name) {
                Ok(()) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(refusal) => block_write_signals(|| fallbacks::copy_beside(staged, &refusal))?,
            }
        }
        // This takes a while, so the target is checked again afterwards.
        staged.write_back()?;
        let old = staged.directory.open_entry(&staged.name).map_err(|source| staged.fail(source))?;
        let old = deferred_close::keep_open(old);
        staged.inherit_attributes_if(&check)?;
        if matches!(staged.location, Location::Unnamed) {
            // Nothing is allocated from here to the rename: running out of memory ends the process, which would leave the
            // name behind.
            match link_beside(&staged.file, &staged.directory) {
                Ok(name) => staged.location = Location::Named(name),
                Err(refusal) => {
                    block_write_signals(|| fallbacks::copy_beside(staged, &refusal))?;
                    staged.write_back()?;
                    staged.inherit_attributes_if(&check)?;
                }
            }
        }
        let Location::Named(name) = &staged.location else { return Ok(None) };
        match staged.directory.rename(name, &staged.name) {
            Ok(()) => {
                deferred_close::close_later(old);
                leftovers::unlock(&staged.file);
                staged.location = Location::Target;
                Ok(None)
            }
            Err(error) if fallbacks::cannot_rename(&error, &staged.directory) => Ok(Some(error)),
            Err(error) => Err(staged.fail(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::sys::fork::OwnerProcess;
    use std::os::unix::fs::FileExt;

    /// A file of `process` that is staged under a name beside the target.
    fn created(directory: &tempfile::TempDir, process: OwnerProcess) -> (AtomicFile, PathBuf) {
        let (target, name) = (directory.path().join("target"), directory.path().join("staged"));
        let directory = Arc::new(Directory::open(directory.path()).expect("opened"));
        let mut staged = StagedFile::create(directory, "target".into(), &target).expect("created");
        staged.file = File::create(&name).expect("a file");
        staged.location = Location::Named("staged".into());
        staged.process = process;
        (AtomicFile { staged, replaces: false, length: 0, complete_length: 0 }, name)
    }

    #[test]
    fn a_dropped_file_is_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let (file, name) = created(&directory, OwnerProcess::current());
        drop(file);
        assert!(!name.exists());
    }

    #[test]
    fn another_process_neither_writes_nor_removes_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let (mut file, name) = created(&directory, OwnerProcess::other());
        let source = tempfile::tempfile().expect("a file");
        source.write_all_at(b"bytes", 0).expect("written");
        for outcome in [
            file.write([&b"bytes"[..]]),
            file.write_at(&b"bytes"[..], 0),
            file.copy_from(&source, 0, 5).map(|_| ()),
            file.share_from(&source, 0, 5).map(|_| ()),
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
