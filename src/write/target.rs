//! Finds out what exists at the path of a save.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::sys::directory::Directory;
use crate::sys::filesystem::is_proc;

/// How many symbolic links the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// What a save does with a target.
#[derive(Debug)]
pub(crate) enum Target {
    /// Replace it: nothing, a regular file, or a symbolic link, whatever it leads to.
    Replaced,
    /// Write to it: a pipe or a character device, perhaps behind symbolic links. The file is open as `O_PATH`.
    Special(File),
    /// Write to this descriptor of the process: /dev/stdout, /dev/fd/3, /proc/self/fd/3.
    Descriptor(RawFd),
    /// Refuse it: a file under /proc that another process has open.
    Foreign,
    /// Refuse it with this error: a directory, a socket or a block device.
    Refused(libc::c_int),
}

impl Target {
    pub(crate) fn find(directory: &Directory, name: &OsStr) -> io::Result<Target> {
        let Some(entry) = directory.open_entry(name)? else { return Ok(Target::Replaced) };
        let kind = entry.metadata()?.file_type();
        if kind.is_symlink() {
            // A link that cannot be followed is replaced like any other.
            let leads_to = directory.open_link_target(name).unwrap_or(None);
            let kind = leads_to
                .as_ref()
                .map(|file| file.metadata())
                .transpose()?
                .map(|metadata| metadata.file_type());
            return match (leads_to, kind) {
                (Some(file), Some(kind)) if kind.is_fifo() || kind.is_char_device() => {
                    Ok(Target::Special(file))
                }
                (_, Some(kind)) if kind.is_block_device() => Ok(Target::Refused(libc::ENODEV)),
                _ => descriptor(directory, name),
            };
        }
        Ok(match kind {
            kind if kind.is_file() => Target::Replaced,
            kind if kind.is_dir() => Target::Refused(libc::EISDIR),
            kind if kind.is_fifo() || kind.is_char_device() => Target::Special(entry),
            _ => Target::Refused(libc::ENODEV),
        })
    }
}

/// Resolves the symbolic link `name`. If it is under /proc, or leads there, it means a descriptor, even a closed one,
/// because nothing can be replaced there.
fn descriptor(directory: &Directory, name: &OsStr) -> io::Result<Target> {
    let mut place: (Option<Directory>, OsString) = (None, name.to_os_string());
    for _ in 0..MAX_LINKS {
        let (at, name) = (place.0.as_ref().unwrap_or(directory), &place.1);
        if is_proc(at.file()) {
            let own = Directory::open(Path::new("/proc/self/fd"))?.identity()?;
            let is_own = at.identity()? == own;
            let number = name.to_str().and_then(|name| name.parse().ok()).filter(|_| is_own);
            return Ok(number.map_or(Target::Foreign, Target::Descriptor));
        }
        place = match at.read_link(name).and_then(|to| at.open_parent_at(&to)) {
            Ok((next, name)) => (Some(next), name),
            // Not a link, or a dangling one.
            Err(_) => return Ok(Target::Replaced),
        };
    }
    Ok(Target::Replaced)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_replaced_except_those_to_pipes_devices_and_descriptors() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let find = |path: &Path| {
            let (directory, name) = Directory::open_parent(path).expect("a directory");
            Target::find(&directory, &name).expect("looked at")
        };
        fs::write(at("file"), "bytes").expect("written");
        for to in ["file", "nothing", ".", "loop"] {
            symlink(to, at("loop")).expect("linked");
            assert!(matches!(find(&at("loop")), Target::Replaced), "{to}");
            fs::remove_file(at("loop")).expect("removed");
        }
        let file = File::open(at("file")).expect("opened");
        let number = file.as_raw_fd();
        let own = format!("/proc/self/fd/{number}");
        symlink(&own, at("first")).expect("linked");
        symlink("first", at("second")).expect("linked");
        for path in [Path::new(&own), Path::new(&format!("/dev/fd/{number}")), &at("first"), &at("second")] {
            assert!(matches!(find(path), Target::Descriptor(found) if found == number), "{}", path.display());
        }
        let parent = std::os::unix::process::parent_id();
        for foreign in ["/proc/self/exe".to_string(), format!("/proc/{parent}/exe")] {
            assert!(matches!(find(Path::new(&foreign)), Target::Foreign), "{foreign}");
        }
        // Nor is a closed descriptor replaced: /dev/stdout may lead to it.
        let closed = format!("/proc/self/fd/{}", libc::c_int::MAX);
        symlink(&closed, at("closed")).expect("linked");
        assert!(matches!(find(&at("closed")), Target::Descriptor(libc::c_int::MAX)));
        symlink("/dev/null", at("null")).expect("linked");
        assert!(matches!(find(&at("null")), Target::Special(_)));
        assert!(matches!(find(Path::new("/dev/null")), Target::Special(_)));
        assert!(
            matches!(find(&at("file")), Target::Replaced) && matches!(find(&at("new")), Target::Replaced)
        );
        fs::create_dir(at("directory")).expect("made");
        assert!(matches!(find(&at("directory")), Target::Refused(libc::EISDIR)));
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("bound");
        assert!(matches!(find(&at("socket")), Target::Refused(libc::ENODEV)));
    }
}
