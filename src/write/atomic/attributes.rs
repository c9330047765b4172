//! What a new file takes over from the one that it replaces: owner, group and permissions. And its space.

use std::ffi::OsStr;
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

use super::acl::Acl;
use crate::sys::directory::Directory;

/// Who owns a file, and who may do what with it.
#[derive(Clone, Debug)]
pub(crate) struct Attributes {
    uid: u32,
    gid: u32,
    mode: u32,
    acl: Option<Acl>,
}

impl Attributes {
    /// Those of the regular file `name`, or of the one that a symbolic link of this name leads to; `None` if there is no
    /// such file.
    pub(crate) fn at(directory: &Directory, name: &OsStr) -> io::Result<Option<Attributes>> {
        let Some(entry) = directory.open_link_target(name)? else { return Ok(None) };
        let told = entry.metadata()?;
        if told.is_file() { Attributes::of(&entry, &told).map(Some) } else { Ok(None) }
    }

    /// Those of a file that locks `directory`: whoever may write there may open the file, and nobody else.
    pub(crate) fn for_lock(directory: &Directory) -> io::Result<Attributes> {
        let of = Attributes::of(directory.file(), &directory.metadata()?)?;
        let class = |shift: u32| for_writers(of.mode >> shift & 0o7) << shift;
        // The owner has made the file, whatever their rights in the directory.
        let mode = 0o600 | class(3) | class(0);
        Ok(Attributes { mode, acl: of.acl.map(|acl| acl.for_writers()), ..of })
    }

    /// Those of what was opened as `entry` (`O_PATH`).
    fn of(entry: &File, told: &Metadata) -> io::Result<Attributes> {
        let mut mode = told.mode() & 0o7777;
        let acl = match Acl::of_entry(entry) {
            // Without /proc to ask, the rights of the group may be those of a mask.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES)) =>
            {
                mode = with_group(mode, mode & mode >> 3);
                None
            }
            acl => acl?,
        };
        Ok(Attributes { uid: told.uid(), gid: told.gid(), mode, acl })
    }

    /// Gives `file` these, as far as this process may; returns whether that has changed the file.
    ///
    /// Only root may give a file away, and only to an owner that its user namespace knows; everyone may give one to a
    /// group that they are in. If the group cannot be kept, the new one gets no more rights than all others have. If
    /// the access control list cannot, the group gets the rights that it had by that. Nobody gets a right that they did
    /// not have, not even for a moment.
    pub(crate) fn inherit(&self, file: &File) -> io::Result<bool> {
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (self.uid, self.gid)
            && !try_chown(file, Some(self.uid), Some(self.gid))?
            && own.gid() != self.gid
        {
            try_chown(file, None, Some(self.gid))?;
        }
        let now = file.metadata()?;
        let (mut mode, mut acl) = (self.mode, self.acl.clone());
        if (now.uid(), now.gid()) != (self.uid, self.gid) {
            // Drops setuid and setgid: the owner has changed.
            mode &= 0o1777;
        }
        let mut group = acl.as_ref().map_or(mode >> 3 & 0o7, Acl::group_rights);
        if now.gid() != self.gid {
            // Members of the group of before are among all others now.
            group &= mode;
            mode = mode & !0o7 | group & 0o7;
            acl = acl.map(|acl| acl.for_another_group());
        }
        let before = Acl::of(file)?;
        if let Some(wanted) = acl.take_if(|acl| before.as_ref() != Some(acl)) {
            match wanted.set(file) {
                Ok(()) => acl = Some(wanted),
                // Another filesystem than the old file's, or users that the namespace does not know.
                Err(error) if cannot(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if acl.is_none() {
            // One that the directory hands down to new files would have other users read this one.
            if before.is_some() {
                Acl::remove(file)?;
            }
            mode = with_group(mode, group);
        }
        let has_changed =
            |now: &Metadata| (now.uid(), now.gid(), now.mode()) != (own.uid(), own.gid(), own.mode());
        if file.metadata()?.mode() & 0o7777 != mode {
            file.set_permissions(Permissions::from_mode(mode))?;
        }
        Ok(acl != before || has_changed(&file.metadata()?))
    }
}

/// The permissions `mode` with these of the group.
fn with_group(mode: u32, group: u32) -> u32 {
    mode & !0o070 | (group & 0o7) << 3
}

/// The rights to open a file of those who have these in a directory.
pub(crate) fn for_writers(rights: u32) -> u32 {
    if rights & 0o2 == 0 { 0 } else { 0o6 }
}

/// Returns whether the owner could be changed: not if this process may not, or the filesystem has no owners.
fn try_chown(file: &File, uid: Option<u32>, gid: Option<u32>) -> io::Result<bool> {
    match fchown(file, uid, gid) {
        Ok(()) => Ok(true),
        Err(error) if cannot(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether an attribute was refused that this process may not give, or the filesystem does not have.
fn cannot(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP))
}

/// Reserves the blocks of a new file of `length` bytes, so that a full disk is found before the first one is written.
///
/// The length of the file grows with what is written, where the filesystem can do that: then a loss of power leaves a
/// file that is too short, which readers refuse, rather than zeros.
pub(crate) fn reserve(file: &File, length: u64) -> io::Result<()> {
    // NFS can only reserve space and set the length at once.
    if !preallocate(file, libc::FALLOC_FL_KEEP_SIZE, length)? {
        preallocate(file, 0, length)?;
    }
    Ok(())
}

/// The same for a file that keeps its contents and its length until they are written over.
pub(crate) fn reserve_beyond(file: &File, length: u64) -> io::Result<()> {
    preallocate(file, libc::FALLOC_FL_KEEP_SIZE, length)?;
    Ok(())
}

/// Returns `false` if the filesystem cannot do this: the writes will find the space, or report that there is none.
fn preallocate(file: &File, mode: libc::c_int, length: u64) -> io::Result<bool> {
    let length = libc::off_t::try_from(length).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    if length == 0 {
        return Ok(true);
    }
    loop {
        // SAFETY: a call without pointers on a descriptor that `file` keeps open.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, length) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::ESPIPE) => {
                return Ok(false);
            }
            _ => return Err(error),
        }
    }
}
