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

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Acl(Vec<Entry>);

#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry {
    tag: u16,
    rights: u16,
    id: u32,
}

impl Acl {
    /// Returns the list of an open file; `None` if it has none, or its filesystem supports none.
    pub(crate) fn of(file: &File) -> io::Result<Option<Acl>> {
        // SAFETY: `fgetxattr` requires a C string, which `NAME` is, and a buffer of `length` bytes, which `read` passes.
        read(|buffer, length| unsafe { libc::fgetxattr(file.as_raw_fd(), NAME.as_ptr(), buffer, length) })
    }

    /// Returns the list of a file that is open as `O_PATH`; an error if /proc is not mounted.
    pub(crate) fn of_entry(entry: &File) -> io::Result<Option<Acl>> {
        let path = CString::new(proc_path(entry))?;
        // SAFETY: `getxattr` requires two C strings, which `path` and `NAME` are, and a buffer of `length` bytes, which
        // `read` passes.
        read(|buffer, length| unsafe { libc::getxattr(path.as_ptr(), NAME.as_ptr(), buffer, length) })
    }

    /// Sets the list of `file`, and with it its permissions.
    pub(crate) fn set(&self, file: &File) -> io::Result<()> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for Entry { tag, rights, id } in &self.0 {
            bytes.extend(tag.to_le_bytes().into_iter().chain(rights.to_le_bytes()).chain(id.to_le_bytes()));
        }
        // SAFETY: `fsetxattr` requires a C string, which `NAME` is, and readable bytes, which `bytes` has `len()` of.
        let status = unsafe {
            libc::fsetxattr(file.as_raw_fd(), NAME.as_ptr(), bytes.as_ptr().cast(), bytes.len(), 0)
        };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Removes the list of `file`, if it has one.
    pub(crate) fn remove(file: &File) -> io::Result<()> {
        // SAFETY: `fremovexattr` requires a C string, which `NAME` is.
        if unsafe { libc::fremovexattr(file.as_raw_fd(), NAME.as_ptr()) } == 0 {
            return Ok(());
        }
        none_if_unknown(io::Error::last_os_error()).map(|_| ())
    }

    /// Returns the rights of the file's group. The group bits of its mode are the mask's instead.
    pub(crate) fn group_rights(&self) -> u32 {
        self.rights(GROUP_OBJ) & self.rights(MASK)
    }

    /// Returns the same list in which the group and all others have only the rights that both had.
    pub(crate) fn for_another_group(&self) -> Acl {
        let both = (self.group_rights() & self.rights(OTHER)) as u16;
        self.map(|entry| if matches!(entry.tag, GROUP_OBJ | OTHER) { both } else { entry.rights })
    }

    /// Returns the same list with [`writers_only`] rights.
    pub(crate) fn writers_only(&self) -> Acl {
        self.map(|entry| writers_only(u32::from(entry.rights)) as u16)
    }

    fn map(&self, rights: impl Fn(&Entry) -> u16) -> Acl {
        Acl(self.0.iter().map(|entry| Entry { rights: rights(entry), ..*entry }).collect())
    }

    /// Returns the rights of the entry with this tag; all rights if there is none (the mask is optional).
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

/// Returns the right to read and write if `rights` allow writing, otherwise none.
pub(crate) fn writers_only(rights: u32) -> u32 {
    if rights & 0o2 == 0 { 0 } else { 0o6 }
}

/// Reads the list with `get`, a call of the `getxattr` family.
fn read(get: impl Fn(*mut c_void, usize) -> isize) -> io::Result<Option<Acl>> {
    let mut bytes = vec![0u8; MOST_BYTES];
    let length = get(bytes.as_mut_ptr().cast(), bytes.len());
    let Ok(length) = usize::try_from(length) else { return none_if_unknown(io::Error::last_os_error()) };
    let invalid =
        || io::Error::new(io::ErrorKind::InvalidData, "an access control list of an unknown version");
    Acl::parse(&bytes[..length]).map(Some).ok_or_else(invalid)
}

/// Returns `None` for the errors of a file without a list and of a filesystem without lists.
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
    fn the_groups_rights_are_not_the_mask() {
        assert_eq!(list(0, 6, 0).group_rights(), 0);
        assert_eq!(list(6, 4, 0).group_rights(), 4);
        let changed = list(6, 4, 5).for_another_group();
        assert_eq!(changed, Acl(list(4, 4, 4).0));
        assert_eq!(list(5, 7, 0).writers_only(), list(0, 6, 0));
    }

    #[test]
    fn a_list_that_is_set_is_read_again() {
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
    fn malformed_lists_are_refused() {
        assert_eq!(Acl::parse(&[2, 0, 0, 0]), Some(Acl(Vec::new())));
        for bytes in [&[][..], &[2, 0, 0], &[1, 0, 0, 0], &[2, 0, 0, 0, 1]] {
            assert_eq!(Acl::parse(bytes), None, "{bytes:?}");
        }
    }
}
