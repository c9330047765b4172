//! What a commit does if the filesystem lacks a step of it: a staged file that cannot get a name is copied into one that
//! has a name, and a target that cannot be renamed over is overwritten in place.
//!
//! A copy of a synchronized file is synchronized too. `docs/saving.md` describes what readers see.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::MetadataExt;

use super::attributes::Attributes;
use super::staging::{self, Location, Purpose, StagedFile};
use super::{deferred_close, file_copy, leftovers, preallocate};
use crate::error::{Error, Result};
use crate::sys::directory::Directory;
use crate::write::{mapped, write_back};

/// Whether `error` says that nothing can be renamed there: the target is a mount point, or the filesystem has no renames.
/// A missing permission remains an error.
pub(crate) fn cannot_rename(error: &io::Error, directory: &Directory) -> bool {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EXDEV | libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL) => true,
        // In a sticky directory EPERM means that the target belongs to another user.
        Some(libc::EPERM) => {
            directory.file().metadata().is_ok_and(|metadata| metadata.mode() & libc::S_ISVTX == 0)
        }
        _ => false,
    }
}

/// Replaces an unnamed staged file, which cannot be linked because of `refusal`, by a copy that has a name.
pub(crate) fn copy_beside(staged: &mut StagedFile, refusal: &io::Error) -> Result<()> {
    try_copy_beside(staged).map_err(|source| {
        staged.fail(source).with_remedy(&format!(
            "a second copy was needed, as the file that was written has no name and cannot be linked to one: {refusal}"
        ))
    })
}

fn try_copy_beside(staged: &mut StagedFile) -> io::Result<()> {
    let length = staged.file.metadata()?.len();
    let mode = staging::creation_mode(staged.attributes.is_some());
    let (file, name) = staging::create_named(&staged.directory, mode)?;
    let unnamed = std::mem::replace(&mut staged.file, file);
    // From here on, dropping `staged` removes the copy.
    staged.location = Location::Named(name);
    deferred_close::reserve(&staged.file, length)?;
    let mut done = 0;
    while done < length {
        match file_copy::append(&mut staged.file, &unnamed, done, length - done)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    if *staged.is_synchronized.get_mut() {
        staged.synchronize()?;
    }
    write_back::check_deferred_errors(&staged.file)
}

/// Overwrites a target that cannot be renamed over because of `refusal`. Its space is reserved before its first byte
/// changes, and the staged file stays if the copy still fails. A target that did not exist is removed again instead.
pub(crate) fn overwrite_in_place(staged: &mut StagedFile, refusal: &io::Error, durable: bool) -> Result<()> {
    let fail = |source| Error::io("overwrite", &staged.path, source);
    let length = staged.file.metadata().map_err(fail)?.len();
    let (mut target, is_new) = open_over(&staged.directory, &staged.name, staged.attributes.as_ref())
        .map_err(|source| fail(source).with_remedy(&format!("nor can it be renamed over: {refusal}")))?;
    if !is_new {
        mapped::refuse(&target, &staged.path)?;
        return copy_over(staged, &mut target, length, false);
    }
    copy_over(staged, &mut target, length, true).inspect_err(|_| {
        // The first error is returned; readers refuse an incomplete file.
        let _ = staged.directory.remove(&staged.name);
    })?;
    if durable { staged.synchronize_directory() } else { Ok(()) }
}

fn copy_over(staged: &mut StagedFile, target: &mut File, length: u64, is_new: bool) -> Result<()> {
    preallocate::reserve_beyond(target, length)
        .map_err(|source| Error::io("reserve space for", &staged.path, source))?;
    let fail = |staged: &StagedFile, source| Error::io("overwrite", &staged.path, source);
    staged.file.rewind().map_err(|source| fail(staged, source))?;
    if !is_new {
        keep_complete_copy(staged).map_err(|source| fail(staged, source))?;
    }
    let is_synchronized = *staged.is_synchronized.get_mut();
    let copied = io::copy(&mut staged.file, target).and_then(|_| {
        target.set_len(length)?;
        // The complete copy is removed next.
        if is_synchronized {
            target.sync_all()?
        } else {
            write_back::finish(target)?
        }
        write_back::check_deferred_errors(target)
    });
    let Err(source) = copied else { return Ok(()) };
    let error = fail(staged, source);
    // If nothing was written, the old contents still exist.
    if is_new || target.stream_position().is_ok_and(|written| written == 0) {
        return Err(error);
    }
    staged.has_overwritten = true;
    let Location::Named(name) = std::mem::replace(&mut staged.location, Location::Target) else {
        return Err(error);
    };
    let error = error.with_remedy(&format!(
        "its old contents are lost; the new file is complete at {}",
        staged.directory.path_of(&name).display()
    ));
    if name.as_encoded_bytes().ends_with(leftovers::SUFFIX.as_bytes()) {
        return Err(error.with_remedy("copy it from there now: later saves remove files of such names"));
    }
    Err(error)
}

/// Renames the staged file so that no later save removes it: it may become the only complete copy.
fn keep_complete_copy(staged: &mut StagedFile) -> io::Result<()> {
    let Location::Named(name) = &staged.location else { return Ok(()) };
    match staging::rename_to_hidden(&staged.directory, name, Purpose::Complete) {
        Ok(name) => staged.location = Location::Named(name),
        Err(error) if cannot_rename(&error, &staged.directory) => return Ok(()),
        Err(error) => return Err(error),
    }
    // Otherwise a loss of power during the overwrite could remove the new name.
    if *staged.is_synchronized.get_mut() { staged.directory.synchronize() } else { Ok(()) }
}

/// Opens the file `name` for writing, or creates it with these attributes; returns whether it was created. Does not
/// follow a symbolic link.
fn open_over(
    directory: &Directory,
    name: &OsStr,
    attributes: Option<&Attributes>,
) -> io::Result<(File, bool)> {
    match directory.open_at(name, libc::O_WRONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK, 0) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
            let file = directory.open_at(name, flags, staging::creation_mode(attributes.is_some()))?;
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
    fn a_missing_permission_is_an_error_and_a_missing_feature_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let opened = Directory::open(directory.path()).expect("opened");
        let cannot = |number| cannot_rename(&io::Error::from_raw_os_error(number), &opened);
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
    fn a_target_is_opened_or_created_and_no_link_is_followed() {
        let directory = tempfile::tempdir().expect("a directory");
        let opened = Directory::open(directory.path()).expect("opened");
        let at = |name: &str| directory.path().join(name);
        fs::write(at("old"), "bytes").expect("written");
        fs::set_permissions(at("old"), Permissions::from_mode(0o640)).expect("set");
        let old = Attributes::at(&opened, OsStr::new("old")).expect("attributes");
        let open = |name: &str| open_over(&opened, OsStr::new(name), old.as_ref());
        assert!(open("new").expect("created").1);
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
