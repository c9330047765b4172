//! POSIX access control lists, as Linux stores them with a file (`system.posix_acl_access`).

use std::ffi::{CStr, CString, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::sys::directory::proc_path;

const NAME: &CStr = c"system.posix_acl_access";

/// The most bytes that an extended attribute has (`XATTR_SIZE_MAX`).
const MOST_BYTES: usize = 65536;

/// The first four bytes of a list, and the bytes of an entry (`linux/posix_acl_xattr.h`).
const VERSION: u32 = 2;
const ENTRY_BYTES: usize = 8;

const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// Who has which rights.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Acl(Vec<Entry>);

#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry {
    tag: u16,
    rights: u16,
    id: u32,
}

impl Acl {
    /// The list of an open file; `None` if it has none, or its filesystem knows none.
    pub(crate) fn of(file: &File) -> io::Result<Option<Acl>> {
        // SAFETY: a descriptor that `file` keeps open, a string that ends in NUL, and a buffer of `length` bytes.
        read(|buffer, length| unsafe { libc::fgetxattr(file.as_raw_fd(), NAME.as_ptr(), buffer, length) })
    }

    /// The same of one that was opened only to be looked at (`O_PATH`); an error if /proc is not there for that.
    pub(crate) fn of_entry(entry: &File) -> io::Result<Option<Acl>> {
        let path = CString::new(proc_path(entry))?;
        // SAFETY: two strings that end in NUL, and a buffer of `length` bytes.
        read(|buffer, length| unsafe { libc::getxattr(path.as_ptr(), NAME.as_ptr(), buffer, length) })
    }

    /// Gives `file` this list, and the permissions that come with it.
    pub(crate) fn set(&self, file: &File) -> io::Result<()> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for Entry { tag, rights, id } in &self.0 {
            bytes.extend(tag.to_le_bytes().into_iter().chain(rights.to_le_bytes()).chain(id.to_le_bytes()));
        }
        // SAFETY: a descriptor that `file` keeps open, a string that ends in NUL, and as many bytes as the call is told.
        let status = unsafe {
            libc::fsetxattr(file.as_raw_fd(), NAME.as_ptr(), bytes.as_ptr().cast(), bytes.len(), 0)
        };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Removes the list of `file`, if it has one.
    pub(crate) fn remove(file: &File) -> io::Result<()> {
        // SAFETY: a descriptor that `file` keeps open, and a string that ends in NUL.
        if unsafe { libc::fremovexattr(file.as_raw_fd(), NAME.as_ptr()) } == 0 {
            return Ok(());
        }
        none_if_unknown(io::Error::last_os_error()).map(|_| ())
    }

    /// What the group of the file may do, which the permissions do not tell: there the mask stands in its place.
    pub(crate) fn group_rights(&self) -> u32 {
        self.rights(GROUP_OBJ) & self.rights(MASK)
    }

    /// The same list for a group that may do no more than all others may, and others that may do no more than the group
    /// of before.
    pub(crate) fn for_another_group(&self) -> Acl {
        let both = (self.group_rights() & self.rights(OTHER)) as u16;
        self.map(|entry| if matches!(entry.tag, GROUP_OBJ | OTHER) { both } else { entry.rights })
    }

    /// The same list in which whoever may write may also read, and nobody else may do anything.
    pub(crate) fn for_writers(&self) -> Acl {
        self.map(|entry| super::attributes::for_writers(u32::from(entry.rights)) as u16)
    }

    fn map(&self, rights: impl Fn(&Entry) -> u16) -> Acl {
        Acl(self.0.iter().map(|entry| Entry { rights: rights(entry), ..*entry }).collect())
    }

    /// The rights of the one entry with this tag; all of them where it may be left out, and is.
    fn rights(&self, tag: u16) -> u32 {
        self.0.iter().find(|entry| entry.tag == tag).map_or(0o7, |entry| u32::from(entry.rights))
    }

    fn parse(bytes: &[u8]) -> Option<Acl> {
        let (version, entries) = bytes.split_at_checked(4)?;
        let is_known = version == VERSION.to_le_bytes() && entries.len() % ENTRY_BYTES == 0;
        let number =
            |bytes: &[u8]| bytes.iter().rev().fold(0u32, |value, &byte| value << 8 | u32::from(byte));
        let entries = entries.chunks_exact(ENTRY_BYTES).map(|entry| Entry {
            tag: number(&entry[..2]) as u16,
            rights: number(&entry[2..4]) as u16,
            id: number(&entry[4..]),
        });
        is_known.then(|| Acl(entries.collect()))
    }
}

/// Reads the list with a call of the family of `getxattr`.
fn read(get: impl Fn(*mut c_void, usize) -> isize) -> io::Result<Option<Acl>> {
    let mut bytes = vec![0u8; MOST_BYTES];
    let length = get(bytes.as_mut_ptr().cast(), bytes.len());
    let Ok(length) = usize::try_from(length) else { return none_if_unknown(io::Error::last_os_error()) };
    let invalid =
        || io::Error::new(io::ErrorKind::InvalidData, "an access control list of an unknown version");
    Acl::parse(&bytes[..length]).map(Some).ok_or_else(invalid)
}

/// What a file without a list, and a filesystem without such lists, answer.
fn none_if_unknown(error: io::Error) -> io::Result<Option<Acl>> {
    match error.raw_os_error() {
        Some(libc::ENODATA | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => Ok(None),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER_OBJ: u16 = 0x01;
    const USER: u16 = 0x02;

    fn list(group: u16, mask: u16, other: u16) -> Acl {
        let entry = |tag, rights| Entry { tag, rights, id: u32::MAX };
        Acl(vec![
            entry(USER_OBJ, 6),
            Entry { tag: USER, rights: 6, id: 12345 },
            entry(GROUP_OBJ, group),
            entry(MASK, mask),
            entry(OTHER, other),
        ])
    }

    #[test]
    fn the_mask_is_not_what_the_group_may_do() {
        assert_eq!(list(0, 6, 0).group_rights(), 0);
        assert_eq!(list(6, 4, 0).group_rights(), 4);
        let changed = list(6, 4, 5).for_another_group();
        assert_eq!(changed, Acl(list(4, 4, 4).0));
        assert_eq!(list(5, 7, 0).for_writers(), list(0, 6, 0));
    }

    #[test]
    fn what_is_set_is_read_again() {
        let file = tempfile::tempfile().expect("a file");
        assert_eq!(Acl::of(&file).expect("read"), None);
        Acl::remove(&file).expect("nothing to remove");
        let acl = list(4, 6, 0);
        match acl.set(&file) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                println!("skipped: {} has no access control lists", std::env::temp_dir().display());
                return;
            }
            set => set.expect("set"),
        }
        assert_eq!(Acl::of(&file).expect("read"), Some(acl.clone()));
        assert_eq!(Acl::of_entry(&file).expect("read"), Some(acl));
        Acl::remove(&file).expect("removed");
        assert_eq!(Acl::of(&file).expect("read"), None);
    }

    #[test]
    fn bytes_of_another_kind_are_refused() {
        assert_eq!(Acl::parse(&[2, 0, 0, 0]), Some(Acl(Vec::new())));
        for bytes in [&[][..], &[2, 0, 0], &[1, 0, 0, 0], &[2, 0, 0, 0, 1]] {
            assert_eq!(Acl::parse(bytes), None, "{bytes:?}");
        }
    }
}
