//! A directory that is held open, so that a name in it means the same file whatever happens to the path that led to it:
//! another working directory, a directory that was renamed, a symbolic link that was changed.
//!
//! Nothing here knows of saves. The descriptor (`O_PATH`) takes no right but that to go through the directory.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Opens the directory of the file at `path`, to do `action` ("open", "create") with it; returns its name there too.
pub(crate) fn open_parent(path: &Path, action: &str) -> Result<(Directory, OsString)> {
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(nul_in_path(path));
    }
    Directory::open_parent(path).map_err(|source| Error::io(action, path, source))
}

/// The error for a path that no file can have.
pub(crate) fn nul_in_path(path: &Path) -> Error {
    let detail = format!("file name {:?} contains a NUL byte: no file can have it", path);
    Error::new(ErrorKind::InvalidArgument, detail)
}

/// An open directory, and the path that it was opened by.
#[derive(Debug)]
pub(crate) struct Directory {
    file: File,
    path: PathBuf,
}

impl Directory {
    /// Opens the directory at `path`.
    pub(crate) fn open(path: &Path) -> io::Result<Directory> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC);
        Ok(Directory { file: options.open(path)?, path: path.to_path_buf() })
    }

    /// Opens the directory that the last name of `path` is in; returns that name too. `EISDIR` if `path` can only be
    /// that of a directory, as it ends in a slash or a dot.
    pub(crate) fn open_parent(path: &Path) -> io::Result<(Directory, OsString)> {
        let (parent, name) = split(path)?;
        Ok((Directory::open(parent)?, name.to_os_string()))
    }

    /// The same of a path that begins in this directory unless it begins at the root.
    pub(crate) fn open_parent_at(&self, path: &Path) -> io::Result<(Directory, OsString)> {
        let (parent, name) = split(path)?;
        let directory = self.subdirectory(parent.as_os_str())?;
        Ok((directory, name.to_os_string()))
    }

    /// Opens the directory that `name` leads to from this one; a symbolic link is followed.
    pub(crate) fn subdirectory(&self, name: &OsStr) -> io::Result<Directory> {
        let file = self.open_at(name, libc::O_PATH | libc::O_DIRECTORY, 0)?;
        Ok(Directory { file, path: self.path_of(name) })
    }

    /// The path that this was opened by; for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of `name`; for messages.
    pub(crate) fn path_of(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    /// What tells this directory from every other one.
    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        self.file.metadata().map(|told| identity(&told))
    }

    /// The owner, the permissions and so on of the directory itself.
    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// The descriptor, which can be used to look at the directory alone.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Opens `name` with the flags of `open(2)`, and what the umask leaves of `mode` if that makes a file.
    pub(crate) fn open_at(&self, name: &OsStr, flags: libc::c_int, mode: libc::mode_t) -> io::Result<File> {
        let name = c_string(name)?;
        loop {
            // SAFETY: a descriptor that `self.file` keeps open, and a string that ends in NUL and outlives the call.
            let opened = unsafe {
                libc::openat(
                    self.file.as_raw_fd(),
                    name.as_ptr(),
                    flags | libc::O_CLOEXEC,
                    libc::c_uint::from(mode),
                )
            };
            if opened >= 0 {
                // SAFETY: the kernel has just made this descriptor, and nothing else has it.
                return Ok(unsafe { File::from_raw_fd(opened) });
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// A descriptor of what is at `name`, a symbolic link itself if it is one, that can only be asked what it is;
    /// `None` if there is nothing.
    pub(crate) fn open_entry(&self, name: &OsStr) -> io::Result<Option<File>> {
        not_found_as_none(self.open_at(name, libc::O_PATH | libc::O_NOFOLLOW, 0))
    }

    /// As [`Directory::open_entry`], but of what a symbolic link leads to; `None` if it leads to nothing.
    pub(crate) fn open_link_target(&self, name: &OsStr) -> io::Result<Option<File>> {
        match self.open_at(name, libc::O_PATH, 0) {
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => Ok(None),
            opened => not_found_as_none(opened),
        }
    }

    /// Opens for use what was looked at as `entry` under this `name`, and nothing that has taken its place.
    pub(crate) fn reopen(&self, entry: &File, name: &OsStr, flags: libc::c_int) -> io::Result<File> {
        let opened = self.open_at(proc_path(entry).as_ref(), flags, 0);
        if !opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return opened;
        }
        // Without /proc by its name, which may have gone to another file meanwhile.
        let opened = self.open_at(name, flags, 0)?;
        if identity(&opened.metadata()?) == identity(&entry.metadata()?) {
            return Ok(opened);
        }
        Err(io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// Where the symbolic link `name` leads to.
    pub(crate) fn read_link(&self, name: &OsStr) -> io::Result<PathBuf> {
        let name = c_string(name)?;
        let mut target = vec![0u8; libc::PATH_MAX as usize];
        // SAFETY: an open descriptor, a string that ends in NUL, and a buffer of as many bytes as the call is told.
        let length = unsafe {
            libc::readlinkat(self.file.as_raw_fd(), name.as_ptr(), target.as_mut_ptr().cast(), target.len())
        };
        target.truncate(usize::try_from(length).map_err(|_| io::Error::last_os_error())?);
        Ok(OsString::from_vec(target).into())
    }

    /// Gives a file that has no name (`O_TMPFILE`) this one. Needs /proc.
    pub(crate) fn link(&self, file: &File, name: &OsStr) -> io::Result<()> {
        let from = c_string(proc_path(file).as_ref())?;
        let to = c_string(name)?;
        // SAFETY: an open descriptor, and two strings that end in NUL and outlive the call.
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

    /// Renames `from` to `to`, whatever is there.
    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        let (from, to, fd) = (c_string(from)?, c_string(to)?, self.file.as_raw_fd());
        // SAFETY: an open descriptor, and two strings that end in NUL and outlive the call.
        check_status(unsafe { libc::renameat(fd, from.as_ptr(), fd, to.as_ptr()) })
    }

    /// Removes the file `name`.
    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        self.unlink(name, 0)
    }

    /// Removes the empty directory `name`.
    pub(crate) fn remove_directory(&self, name: &OsStr) -> io::Result<()> {
        self.unlink(name, libc::AT_REMOVEDIR)
    }

    fn unlink(&self, name: &OsStr, flags: libc::c_int) -> io::Result<()> {
        let name = c_string(name)?;
        // SAFETY: an open descriptor, and a string that ends in NUL and outlives the call.
        check_status(unsafe { libc::unlinkat(self.file.as_raw_fd(), name.as_ptr(), flags) })
    }

    /// Makes the directory `name`.
    pub(crate) fn create_directory(&self, name: &OsStr) -> io::Result<()> {
        let name = c_string(name)?;
        // SAFETY: an open descriptor, and a string that ends in NUL and outlives the call.
        check_status(unsafe { libc::mkdirat(self.file.as_raw_fd(), name.as_ptr(), 0o777) })
    }

    /// The names in the directory, in the order in which the filesystem has them.
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

    /// Has all names in the directory put on the disk.
    pub(crate) fn synchronize(&self) -> io::Result<()> {
        match self.open_at(OsStr::new("."), libc::O_RDONLY, 0)?.sync_all() {
            // What filesystems answer whose directories need no synchronizing, or know none.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            outcome => outcome,
        }
    }
}

/// A stream over the names in a directory.
struct DirectoryStream(*mut libc::DIR);

impl DirectoryStream {
    fn new(directory: File) -> io::Result<DirectoryStream> {
        let descriptor = directory.into_raw_fd();
        // SAFETY: a descriptor that nothing else has; the stream owns it if there is one.
        let stream = unsafe { libc::fdopendir(descriptor) };
        if stream.is_null() {
            let error = io::Error::last_os_error();
            // SAFETY: no stream was made, so the descriptor is still ours alone.
            drop(unsafe { File::from_raw_fd(descriptor) });
            return Err(error);
        }
        Ok(DirectoryStream(stream))
    }

    fn next(&mut self) -> io::Result<Option<OsString>> {
        // `readdir` tells its end from an error by this alone.
        // SAFETY: the place is this thread's.
        unsafe { *libc::__errno_location() = 0 };
        // SAFETY: an open stream, which `&mut self` keeps other threads from.
        let entry = unsafe { libc::readdir64(self.0) };
        if entry.is_null() {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(0) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the entry is valid until the next call, and its name ends in NUL; the pointer is made without a
        // reference to the whole of it, which may be shorter than its type.
        let name = unsafe { std::ffi::CStr::from_ptr((&raw const (*entry).d_name).cast()) };
        Ok(Some(OsStr::from_bytes(name.to_bytes()).to_os_string()))
    }
}

impl Drop for DirectoryStream {
    fn drop(&mut self) {
        // SAFETY: the stream was made by `new`, and is closed once.
        unsafe { libc::closedir(self.0) };
    }
}

/// The directory that the last name of `path` is in, and that name.
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

/// What tells a file from every other one on this machine.
pub(crate) fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The name of an open file under /proc.
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

/// A name as C has it, which needs no memory to be allocated unless it is longer than a file name can be.
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
    // The last byte stays 0.
    let long = if bytes.len() < short.len() { None } else { Some(CString::new(bytes)?) };
    if long.is_none() {
        short[..bytes.len()].copy_from_slice(bytes);
    }
    Ok(Name { short, long })
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
    fn a_path_is_a_directory_and_a_name() {
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
    fn names_stay_those_of_the_directory_that_was_opened() {
        let root = tempfile::tempdir().expect("a directory");
        let (first, aside) = (root.path().join("first"), root.path().join("aside"));
        fs::create_dir(&first).expect("made");
        let held = Directory::open(&first).expect("opened");
        fs::rename(&first, &aside).expect("renamed");
        fs::create_dir(&first).expect("made");
        held.open_at(name("a"), libc::O_CREAT | libc::O_WRONLY, 0o666).expect("made");
        held.rename(name("a"), name("b")).expect("renamed");
        held.create_directory(name("c")).expect("made");
        let mut names = held.names().expect("listed");
        names.sort();
        assert_eq!(names, ["b", "c"]);
        assert!(aside.join("b").exists() && fs::read_dir(&first).expect("there").next().is_none());
        held.remove(name("b")).expect("removed");
        held.remove_directory(name("c")).expect("removed");
        held.synchronize().expect("synchronized");
        assert!(held.names().expect("listed").is_empty());
    }

    #[test]
    fn an_entry_is_the_link_and_not_what_it_leads_to() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("file"), "bytes").expect("written");
        for (link, to) in [("link", "file"), ("dangling", "nothing"), ("loop", "loop")] {
            symlink(to, directory.path().join(link)).expect("linked");
        }
        let held = Directory::open(directory.path()).expect("opened");
        let is_link = |at: &str| {
            held.open_entry(name(at))
                .expect("looked at")
                .expect("there")
                .metadata()
                .expect("told")
                .is_symlink()
        };
        assert!(is_link("link") && is_link("dangling") && is_link("loop") && !is_link("file"));
        let leads_to = held.open_link_target(name("link")).expect("looked at").expect("there");
        assert_eq!(leads_to.metadata().expect("told").len(), 5);
        for nothing in ["dangling", "loop", "nothing"] {
            assert!(held.open_link_target(name(nothing)).expect("looked at").is_none());
        }
        assert!(held.open_entry(name("nothing")).expect("looked at").is_none());
        assert_eq!(held.read_link(name("link")).expect("a link"), Path::new("file"));
        held.read_link(name("file")).expect_err("no link");
    }
}
