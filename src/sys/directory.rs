//! An open directory, in which a name means the same file although the path to it changes: another working directory, a
//! renamed directory, a changed symbolic link.
//!
//! The descriptor (`O_PATH`) needs only the right to traverse the directory.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Opens the parent directory of `path` and returns it with the file name. `action` ("open", "create") is for errors.
pub(crate) fn open_parent(path: &Path, action: &str) -> Result<(Directory, OsString)> {
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(nul_in_path(path));
    }
    Directory::open_parent(path).map_err(|source| Error::io(action, path, source))
}

pub(crate) fn nul_in_path(path: &Path) -> Error {
    let detail = format!("file name {path:?} contains a NUL byte; no file can have it");
    Error::new(ErrorKind::InvalidArgument, detail)
}

/// An open directory, and the path that opened it.
#[derive(Debug)]
pub(crate) struct Directory {
    file: File,
    path: PathBuf,
}

impl Directory {
    pub(crate) fn open(path: &Path) -> io::Result<Directory> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC);
        Ok(Directory { file: options.open(path)?, path: path.to_path_buf() })
    }

    /// Opens the parent directory of `path` and returns it with the last name. `EISDIR` if `path` ends in a slash or a dot,
    /// as only the path of a directory does.
    pub(crate) fn open_parent(path: &Path) -> io::Result<(Directory, OsString)> {
        let (parent, name) = split(path)?;
        Ok((Directory::open(parent)?, name.to_os_string()))
    }

    /// As [`Directory::open_parent`], for a path relative to this directory.
    pub(crate) fn open_parent_at(&self, path: &Path) -> io::Result<(Directory, OsString)> {
        let (parent, name) = split(path)?;
        let directory = self.subdirectory(parent.as_os_str())?;
        Ok((directory, name.to_os_string()))
    }

    /// Opens the directory `name`, following symbolic links.
    pub(crate) fn subdirectory(&self, name: &OsStr) -> io::Result<Directory> {
        let file = self.open_at(name, libc::O_PATH | libc::O_DIRECTORY, 0)?;
        Ok(Directory { file, path: self.path_of(name) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn path_of(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        self.file.metadata().map(|metadata| identity(&metadata))
    }

    /// Returns the `O_PATH` descriptor.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Opens `name` with flags of `open(2)`; `mode`, reduced by the umask, applies to a new file.
    pub(crate) fn open_at(&self, name: &OsStr, flags: libc::c_int, mode: libc::mode_t) -> io::Result<File> {
        let name = c_string(name)?;
        loop {
            // SAFETY: `self.file` keeps the descriptor open; `c_string` ends the name in NUL, and it outlives the call.
            let opened = unsafe {
                libc::openat(
                    self.file.as_raw_fd(),
                    name.as_ptr(),
                    flags | libc::O_CLOEXEC,
                    libc::c_uint::from(mode),
                )
            };
            if opened >= 0 {
                // SAFETY: openat has just created this descriptor, and nothing else owns it.
                return Ok(unsafe { File::from_raw_fd(opened) });
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Opens whatever has the name, including a symbolic link itself, as an `O_PATH` descriptor; `None` if nothing has.
    pub(crate) fn open_entry(&self, name: &OsStr) -> io::Result<Option<File>> {
        not_found_as_none(self.open_at(name, libc::O_PATH | libc::O_NOFOLLOW, 0))
    }

    /// As [`Directory::open_entry`], but follows symbolic links; `None` for a dangling one too.
    pub(crate) fn open_link_target(&self, name: &OsStr) -> io::Result<Option<File>> {
        match self.open_at(name, libc::O_PATH, 0) {
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => Ok(None),
            opened => not_found_as_none(opened),
        }
    }

    /// Opens `entry`, which had this `name`, with other flags; never another file that has replaced it.
    pub(crate) fn reopen(&self, entry: &File, name: &OsStr, flags: libc::c_int) -> io::Result<File> {
        let opened = self.open_at(proc_path(entry).as_ref(), flags, 0);
        if !opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return opened;
        }
        // Without /proc, by its name, which may belong to another file by now.
        let opened = self.open_at(name, flags, 0)?;
        if identity(&opened.metadata()?) == identity(&entry.metadata()?) {
            return Ok(opened);
        }
        Err(io::Error::from_raw_os_error(libc::ESTALE))
    }

    pub(crate) fn read_link(&self, name: &OsStr) -> io::Result<PathBuf> {
        let name = c_string(name)?;
        let mut target = vec![0u8; libc::PATH_MAX as usize];
        // SAFETY: `self.file` keeps the descriptor open, `c_string` ends the name in NUL, and the buffer has the given length.
        let length = unsafe {
            libc::readlinkat(self.file.as_raw_fd(), name.as_ptr(), target.as_mut_ptr().cast(), target.len())
        };
        target.truncate(usize::try_from(length).map_err(|_| io::Error::last_os_error())?);
        Ok(OsString::from_vec(target).into())
    }

    /// Names a file that has no name (`O_TMPFILE`). Needs /proc.
    pub(crate) fn link(&self, file: &File, name: &OsStr) -> io::Result<()> {
        let from = c_string(proc_path(file).as_ref())?;
        let to = c_string(name)?;
        // SAFETY: `self.file` keeps the descriptor open; `c_string` ends both names in NUL, and they outlive the call.
        check_status(unsafe {
            libc::linkat(
                libc::AT_FDCWD,
                from.as_ptr(),
                self.file.as_raw_fd(),
                to.as_ptr(),
                libc::AT_SYMLINK_FOLLOW,
            )
        })
    }

    /// Renames `from` to `to`, replacing a file there.
    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        let (from, to, fd) = (c_string(from)?, c_string(to)?, self.file.as_raw_fd());
        // SAFETY: `self.file` keeps the descriptor open; `c_string` ends both names in NUL, and they outlive the call.
        check_status(unsafe { libc::renameat(fd, from.as_ptr(), fd, to.as_ptr()) })
    }

    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        self.unlink(name, 0)
    }

    pub(crate) fn remove_directory(&self, name: &OsStr) -> io::Result<()> {
        self.unlink(name, libc::AT_REMOVEDIR)
    }

    fn unlink(&self, name: &OsStr, flags: libc::c_int) -> io::Result<()> {
        let name = c_string(name)?;
        // SAFETY: `self.file` keeps the descriptor open; `c_string` ends the name in NUL, and it outlives the call.
        check_status(unsafe { libc::unlinkat(self.file.as_raw_fd(), name.as_ptr(), flags) })
    }

    pub(crate) fn create_directory(&self, name: &OsStr) -> io::Result<()> {
        let name = c_string(name)?;
        // SAFETY: `self.file` keeps the descriptor open; `c_string` ends the name in NUL, and it outlives the call.
        check_status(unsafe { libc::mkdirat(self.file.as_raw_fd(), name.as_ptr(), 0o777) })
    }

    /// Returns the names in the directory, in the order of the filesystem.
    pub(crate) fn names(&self) -> io::Result<Vec<OsString>> {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let mut listing = DirectoryStream::new(self.open_at(OsStr::new("."), flags, 0)?)?;
        let mut names = Vec::new();
        while let Some(name) = listing.next()? {
            if !matches!(name.as_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Writes the names in the directory to the disk.
    pub(crate) fn synchronize(&self) -> io::Result<()> {
        match self.open_at(OsStr::new("."), libc::O_RDONLY, 0)?.sync_all() {
            // The answer of filesystems whose directories cannot be synchronized, or need not be.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            outcome => outcome,
        }
    }
}

struct DirectoryStream(*mut libc::DIR);

impl DirectoryStream {
    fn new(directory: File) -> io::Result<DirectoryStream> {
        let descriptor = directory.into_raw_fd();
        // SAFETY: `into_raw_fd` has made this the only owner of the descriptor; the stream owns it on success.
        let stream = unsafe { libc::fdopendir(descriptor) };
        if stream.is_null() {
            let error = io::Error::last_os_error();
            // SAFETY: fdopendir has failed, so this is still the only owner of the descriptor.
            drop(unsafe { File::from_raw_fd(descriptor) });
            return Err(error);
        }
        Ok(DirectoryStream(stream))
    }

    fn next(&mut self) -> io::Result<Option<OsString>> {
        // Only errno distinguishes the end from an error.
        // SAFETY: errno is thread-local and always valid.
        unsafe { *libc::__errno_location() = 0 };
        // SAFETY: `new` has opened the stream, and `&mut self` excludes other threads.
        let entry = unsafe { libc::readdir64(self.0) };
        if entry.is_null() {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(0) { Ok(None) } else { Err(error) };
        }
        // SAFETY: readdir64 keeps the entry valid until the next call and ends its name in NUL. The entry may be shorter than
        // its type, so no reference to it is created.
        let name = unsafe { std::ffi::CStr::from_ptr((&raw const (*entry).d_name).cast()) };
        Ok(Some(OsStr::from_bytes(name.to_bytes()).to_os_string()))
    }
}

impl Drop for DirectoryStream {
    fn drop(&mut self) {
        // SAFETY: `new` has opened the stream, and drop closes it once.
        unsafe { libc::closedir(self.0) };
    }
}

/// Splits `path` into the parent directory and the last name.
fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    let bytes = path.as_os_str().as_bytes();
    let (parent, name) = match bytes.iter().rposition(|&byte| byte == b'/') {
        Some(0) => (&b"/"[..], &bytes[1..]),
        Some(slash) => (&bytes[..slash], &bytes[slash + 1..]),
        None => (&b"."[..], bytes),
    };
    match name {
        _ if bytes.is_empty() => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EISDIR)),
        _ => Ok((Path::new(OsStr::from_bytes(parent)), OsStr::from_bytes(name))),
    }
}

/// Returns the device and inode, which identify a file on this machine.
pub(crate) fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Returns the path of an open file under /proc.
pub(crate) fn proc_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn not_found_as_none(opened: io::Result<File>) -> io::Result<Option<File>> {
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

fn check_status(status: libc::c_int) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A C string that allocates only if it is longer than a file name can be: a save that allocated between the link and the
/// rename of its file would leave that file behind if memory ran out.
struct Name {
    short: [u8; 256],
    long: Option<CString>,
}

impl Name {
    fn as_ptr(&self) -> *const libc::c_char {
        self.long.as_ref().map_or(self.short.as_ptr().cast(), |long| long.as_ptr())
    }
}

fn c_string(name: &OsStr) -> io::Result<Name> {
    let bytes = name.as_bytes();
    if bytes.contains(&0) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut short = [0; 256];
    if bytes.len() >= short.len() {
        return Ok(Name { short, long: Some(CString::new(bytes)?) });
    }
    // The byte after the name stays 0.
    short[..bytes.len()].copy_from_slice(bytes);
    Ok(Name { short, long: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn name(text: &str) -> &OsStr {
        OsStr::new(text)
    }

    #[test]
    fn a_path_splits_into_directory_and_name() {
        let temporary = tempfile::tempdir().expect("a directory");
        let (directory, last) = Directory::open_parent(&temporary.path().join("file")).expect("opened");
        assert_eq!((directory.path(), &*last), (temporary.path(), name("file")));
        assert_eq!(Directory::open_parent(Path::new("/file")).expect("opened").0.path(), Path::new("/"));
        assert_eq!(Directory::open_parent(Path::new("file")).expect("opened").0.path(), Path::new("."));
        for (path, errno) in
            [("", libc::ENOENT), ("a/", libc::EISDIR), (".", libc::EISDIR), ("a/..", libc::EISDIR)]
        {
            let error = Directory::open_parent(Path::new(path)).expect_err("refused");
            assert_eq!(error.raw_os_error(), Some(errno), "{path}");
        }
    }

    #[test]
    fn names_belong_to_the_directory_that_was_opened() {
        let root = tempfile::tempdir().expect("a directory");
        let (first, renamed) = (root.path().join("first"), root.path().join("renamed"));
        fs::create_dir(&first).expect("created");
        let opened = Directory::open(&first).expect("opened");
        fs::rename(&first, &renamed).expect("renamed");
        fs::create_dir(&first).expect("created");
        opened.open_at(name("a"), libc::O_CREAT | libc::O_WRONLY, 0o666).expect("created");
        opened.rename(name("a"), name("b")).expect("renamed");
        opened.create_directory(name("c")).expect("created");
        let mut names = opened.names().expect("listed");
        names.sort();
        assert_eq!(names, ["b", "c"]);
        assert!(renamed.join("b").exists() && fs::read_dir(&first).expect("exists").next().is_none());
        opened.remove(name("b")).expect("removed");
        opened.remove_directory(name("c")).expect("removed");
        opened.synchronize().expect("synchronized");
        assert!(opened.names().expect("listed").is_empty());
    }

    #[test]
    fn an_entry_is_the_link_itself() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("file"), "bytes").expect("written");
        for (link, to) in [("link", "file"), ("dangling", "nothing"), ("loop", "loop")] {
            symlink(to, directory.path().join(link)).expect("linked");
        }
        let opened = Directory::open(directory.path()).expect("opened");
        let is_link = |at: &str| {
            let entry = opened.open_entry(name(at)).expect("inspected").expect("exists");
            entry.metadata().expect("metadata").is_symlink()
        };
        assert!(is_link("link") && is_link("dangling") && is_link("loop") && !is_link("file"));
        let target = opened.open_link_target(name("link")).expect("inspected").expect("exists");
        assert_eq!(target.metadata().expect("metadata").len(), 5);
        for nothing in ["dangling", "loop", "nothing"] {
            assert!(opened.open_link_target(name(nothing)).expect("inspected").is_none());
        }
        assert!(opened.open_entry(name("nothing")).expect("inspected").is_none());
        assert_eq!(opened.read_link(name("link")).expect("a link"), Path::new("file"));
        opened.read_link(name("file")).expect_err("not a link");
    }
}
