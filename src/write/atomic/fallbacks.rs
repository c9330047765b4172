//! What a commit does on a filesystem that lacks a step of it: a staged file that can be given no name is copied into
//! one that has one, and a target that cannot be renamed over is overwritten in place.
//!
//! Owns these two copies, and which of the kernel's refusals leads to the second. A copy of what was synchronized is
//! synchronized too. `docs/saving.md` has in words who sees what meanwhile.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::staging::{self, Purpose, Staging};
use super::{AtomicFile, Attributes, attributes, check_deferred_errors, file_copy, leftovers, reserve};
use crate::error::{Error, Result};
use crate::sys::directory::Directory;
use crate::write::{mapped, write_back};

/// Whether a rename in `directory` that was refused with `error` is one that cannot be done there at all: the target is
/// a mount point, or the filesystem has no renames. What the process may not do stays an error.
pub(crate) fn cannot_rename(error: &io::Error, directory: &Directory) -> bool {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EXDEV | libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL) => true,
        // Of a sticky directory this is said of a file that is another user's, be it one that everyone may write to.
        Some(libc::EPERM) => directory.metadata().is_ok_and(|told| told.mode() & libc::S_ISVTX == 0),
        _ => false,
    }
}

impl AtomicFile {
    /// For a staged file without a name that cannot be given one, as `refusal` says: goes on with a copy that has one.
    pub(crate) fn copy_beside(&mut self, refusal: &io::Error) -> Result<()> {
        let copied = self.try_copy_beside();
        copied.map_err(|source| {
            Error::io("write", &self.path, source).with_remedy(&format!(
                "a second copy was needed, as the file that was written has no name and cannot be linked to one: {refusal}"
            ))
        })
    }

    fn try_copy_beside(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        let mode = staging::mode_of(self.attributes.is_some());
        let (file, name) = staging::stage_named(&self.directory, mode)?;
        let unnamed = std::mem::replace(&mut self.file, file);
        // From here on, dropping this removes the copy.
        self.staging = Staging::Named(name);
        reserve(&self.file, length)?;
        let mut done = 0;
        while done < length {
            match file_copy::append(&mut self.file, &unnamed, done, length - done) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(file_copy::Failure::Read(error) | file_copy::Failure::Write(error)) => return Err(error),
            }
        }
        if *self.is_synchronized.get_mut() {
            self.inherit()?;
            self.file.sync_all()?;
        }
        check_deferred_errors(&self.file)
    }

    /// For a target that cannot be renamed over, as `refusal` says. Its space is there before its first byte changes,
    /// and should the copy fail all the same, the staged file stays; but for a target that was not there, which goes
    /// again.
    pub(crate) fn overwrite_in_place(&mut self, refusal: &io::Error, durable: bool) -> Result<()> {
        let fail = |source| Error::io("overwrite", &self.path, source);
        let length = self.file.metadata().map_err(fail)?.len();
        let (mut target, is_new) = open_over(&self.directory, &self.name, self.attributes.as_ref())
            .map_err(|source| fail(source).with_remedy(&format!("nor can it be renamed over: {refusal}")))?;
        if !is_new {
            mapped::refuse(&target, &self.path)?;
        }
        let copied = self.copy_over(&mut target, length, is_new);
        if !is_new {
            return copied;
        }
        if copied.is_err() {
            // The error is already on its way, and readers take what is left for the part of a file that it is.
            let _ = self.directory.remove(&self.name);
        }
        copied?;
        if durable { self.synchronize_directory() } else { Ok(()) }
    }

    fn copy_over(&mut self, target: &mut File, length: u64, is_new: bool) -> Result<()> {
        let fail = |path: &Path, source| Error::io("overwrite", path, source);
        attributes::reserve_beyond(target, length)
            .map_err(|source| Error::io("reserve space for", &self.path, source))?;
        self.file.rewind().map_err(|source| fail(&self.path, source))?;
        if let Staging::Named(name) = &self.staging
            && !is_new
        {
            // No stray, whatever happens: it may become the only whole copy.
            match staging::set_aside(&self.directory, name, Purpose::Whole) {
                Ok(name) => {
                    self.staging = Staging::Named(name);
                    // Else a loss of power in the middle could take the name of the one whole copy.
                    if *self.is_synchronized.get_mut() {
                        self.directory.synchronize().map_err(|source| fail(&self.path, source))?;
                    }
                }
                Err(error) if cannot_rename(&error, &self.directory) => {}
                Err(error) => return Err(fail(&self.path, error)),
            }
        }
        let copied = io::copy(&mut self.file, target).and_then(|_| {
            target.set_len(length)?;
            // The one whole copy goes next.
            if *self.is_synchronized.get_mut() {
                target.sync_all()?
            } else {
                write_back::finish(target)?
            }
            check_deferred_errors(target)
        });
        let Err(source) = copied else { return Ok(()) };
        let error = fail(&self.path, source);
        // Where nothing was written, the old contents are still there.
        if is_new || target.stream_position().is_ok_and(|written| written == 0) {
            return Err(error);
        }
        self.has_overwritten = true;
        let Staging::Named(name) = std::mem::replace(&mut self.staging, Staging::InPlace) else {
            return Err(error);
        };
        let error = error.with_remedy(&format!(
            "its old contents are lost; the new file is complete at {}",
            self.directory.path_of(&name).display()
        ));
        let is_stray = name.as_encoded_bytes().ends_with(leftovers::SUFFIX.as_bytes());
        Err(if is_stray {
            error.with_remedy("copy it from there now: later saves remove files of such names")
        } else {
            error
        })
    }
}

/// Opens the file `name` for writing, or makes one with these attributes; returns whether it was made. What a link there
/// leads to is left alone.
fn open_over(
    directory: &Directory,
    name: &OsStr,
    attributes: Option<&Attributes>,
) -> io::Result<(File, bool)> {
    match directory.open_at(name, libc::O_WRONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK, 0) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
            let file = directory.open_at(name, flags, staging::mode_of(attributes.is_some()))?;
            let inherited = attributes.map_or(Ok(false), |attributes| attributes.inherit(&file));
            inherited.inspect_err(|_| drop(directory.remove(name)))?;
            Ok((file, true))
        }
        opened => match opened? {
            file if file.metadata()?.is_file() => Ok((file, false)),
            _ => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn what_may_not_be_done_is_told_from_what_cannot() {
        let directory = tempfile::tempdir().expect("a directory");
        let held = Directory::open(directory.path()).expect("opened");
        let cannot = |number| cannot_rename(&io::Error::from_raw_os_error(number), &held);
        for number in [libc::EBUSY, libc::EXDEV, libc::ENOSYS, libc::EOPNOTSUPP, libc::EINVAL, libc::EPERM] {
            assert!(cannot(number), "{number}");
        }
        for number in [libc::EACCES, libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EROFS, libc::EISDIR] {
            assert!(!cannot(number), "{number}");
        }
        fs::set_permissions(directory.path(), Permissions::from_mode(0o1777)).expect("set");
        assert!(!cannot(libc::EPERM) && cannot(libc::ENOSYS));
    }

    #[test]
    fn a_target_is_opened_or_made_but_no_link_followed() {
        let directory = tempfile::tempdir().expect("a directory");
        let held = Directory::open(directory.path()).expect("opened");
        let at = |name: &str| directory.path().join(name);
        fs::write(at("old"), "bytes").expect("written");
        fs::set_permissions(at("old"), Permissions::from_mode(0o640)).expect("set");
        let old = Attributes::at(&held, OsStr::new("old")).expect("told");
        let open = |name: &str| open_over(&held, OsStr::new(name), old.as_ref());
        assert!(open("new").expect("made").1);
        assert_eq!(at("new").metadata().expect("there").mode() & 0o7777, 0o640);
        assert!(!open("new").expect("opened").1);
        for name in ["new", "nothing"] {
            symlink(name, at("link")).expect("linked");
            assert_eq!(open("link").expect_err("a link").raw_os_error(), Some(libc::ELOOP));
            fs::remove_file(at("link")).expect("removed");
        }
        assert!(!at("nothing").exists());
    }
}
