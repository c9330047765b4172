//! What a new file inherits from the one that it replaces: owner, group and permissions.

use std::ffi::OsStr;
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

use super::acl::{Acl, writers_only};
use crate::sys::directory::Directory;

/// Owner, group, mode and access control list of a file.
#[derive(Clone, Debug)]
pub(crate) struct Attributes {
    uid: u32,
    gid: u32,
    mode: u32,
    acl: Option<Acl>,
}

impl Attributes {
    /// Returns those of the regular file `name`, or of the one that a symbolic link of this name leads to; `None` if
    /// there is none.
    pub(crate) fn at(directory: &Directory, name: &OsStr) -> io::Result<Option<Attributes>> {
        let Some(entry) = directory.open_link_target(name)? else { return Ok(None) };
        let metadata = entry.metadata()?;
        if metadata.is_file() { Attributes::of(&entry, &metadata).map(Some) } else { Ok(None) }
    }

    /// Returns those of a file that locks `directory`: only users who may write there may open it.
    pub(crate) fn for_lock(directory: &Directory) -> io::Result<Attributes> {
        let of = Attributes::of(directory.file(), &directory.file().metadata()?)?;
        let class = |shift: u32| writers_only(of.mode >> shift & 0o7) << shift;
        // The owner created the file, whatever their rights in the directory.
        let mode = 0o600 | class(3) | class(0);
        Ok(Attributes { mode, acl: of.acl.map(|acl| acl.writers_only()), ..of })
    }

    /// Returns those of `entry`, which may be open as `O_PATH`.
    fn of(entry: &File, metadata: &Metadata) -> io::Result<Attributes> {
        let mut mode = metadata.mode() & 0o7777;
        let acl = match Acl::of_entry(entry) {
            // Without /proc the list is unknown, and the group bits of the mode may be its mask.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES)) =>
            {
                mode = with_group(mode, mode & mode >> 3);
                None
            }
            acl => acl?,
        };
        Ok(Attributes { uid: metadata.uid(), gid: metadata.gid(), mode, acl })
    }

    /// Gives `file` these attributes, as far as this process may set them; returns whether the file has changed.
    ///
    /// Only root may change the owner, and only to one that its user namespace knows; everyone may set a group that they
    /// are in. If the group cannot be set, the actual group gets no more rights than others have. If the access control
    /// list cannot be set, the group gets the rights that the list gave it. Nobody gets a new right, even for a moment.
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
            // Members of the old group are others now.
            group &= mode;
            mode = mode & !0o7 | group & 0o7;
            acl = acl.map(|acl| acl.for_another_group());
        }
        let before = Acl::of(file)?;
        if let Some(wanted) = acl.take_if(|acl| before.as_ref() != Some(acl)) {
            match wanted.set(file) {
                Ok(()) => acl = Some(wanted),
                // The old file is on another filesystem, or the namespace does not know some users.
                Err(error) if cannot(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if acl.is_none() {
            // A default list of the directory would let other users read this file.
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

/// Returns `mode` with these rights for the group.
fn with_group(mode: u32, group: u32) -> u32 {
    mode & !0o070 | (group & 0o7) << 3
}

/// Returns `false` if this process may not change the owner, or the filesystem has no owners.
fn try_chown(file: &File, uid: Option<u32>, gid: Option<u32>) -> io::Result<bool> {
    match fchown(file, uid, gid) {
        Ok(()) => Ok(true),
        Err(error) if cannot(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the process may not set an attribute, or the filesystem does not have it.
fn cannot(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP))
}
