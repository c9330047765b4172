//! Finds out whether this process has mapped a file. Such a file must not be overwritten in place: the mapping would
//! change, or end the process (SIGBUS) if the file becomes shorter.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::sys::directory::identity;

/// Refuses to overwrite `file`, which is at `path`, if any part of this process has mapped it.
pub(crate) fn refuse(file: &File, path: &Path) -> Result<()> {
    let is_mapped = is_mapped(file).map_err(|source| {
        Error::io("overwrite", path, source)
            .with_remedy("this process may have mapped it, which /proc is needed to tell")
    })?;
    if !is_mapped {
        return Ok(());
    }
    let busy = io::Error::from_raw_os_error(libc::EBUSY);
    Err(Error::io("overwrite", path, busy).with_remedy(
        "this process has the file mapped, and it can only be overwritten in place, which would change the tensors that \
         show it: load them with the backend \"pread\", or save to another path",
    ))
}

fn is_mapped(file: &File) -> io::Result<bool> {
    let told = file.metadata()?;
    let maps = std::fs::read("/proc/self/maps")?;
    let mut last: &[u8] = b"";
    Ok(maps.split(|&byte| byte == b'\n').any(|line| {
        let Some(mapping) = Mapping::parse(line) else { return false };
        if (mapping.device, mapping.inode) == (told.dev(), told.ino()) {
            return true;
        }
        // Btrfs and overlayfs show another device or inode in /proc than `fstat` returns, so the path is compared too.
        // Neighbouring lines are often parts of one file.
        std::mem::replace(&mut last, mapping.path) != mapping.path
            && unescaped(mapping.path).metadata().is_ok_and(|there| identity(&there) == identity(&told))
    }))
}

/// A line of /proc/self/maps that describes a mapped file.
struct Mapping<'l> {
    device: u64,
    inode: u64,
    path: &'l [u8],
}

impl Mapping<'_> {
    /// Parses `55d4a7c0b000-55d4a7c0d000 r--p 00000000 fe:00 1234     /path of the file`.
    fn parse(line: &[u8]) -> Option<Mapping<'_>> {
        let path = &line[line.iter().position(|&byte| byte == b'/')?..];
        let fields = str::from_utf8(&line[..line.len() - path.len()]).ok()?;
        let mut fields = fields.split_ascii_whitespace().skip(3);
        let (major, minor) = fields.next()?.split_once(':')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        let device = libc::makedev(number(major)?, number(minor)?);
        Some(Mapping { device, inode: fields.next()?.parse().ok()?, path })
    }
}

/// Decodes a path in which the kernel has escaped line breaks.
fn unescaped(path: &[u8]) -> std::path::PathBuf {
    let mut plain = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = rest.strip_prefix(br"\012");
        plain.push(if escaped.is_some() { b'\n' } else { byte });
        rest = escaped.unwrap_or(after);
    }
    OsStr::from_bytes(&plain).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapOptions;

    #[test]
    fn what_is_mapped_is_told_from_what_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["file", "a name\nof two lines"] {
            let path = directory.path().join(name);
            std::fs::write(&path, [1; 5000]).expect("written");
            let file = File::open(&path).expect("opened");
            assert!(!is_mapped(&file).expect("told"));
            // SAFETY: nobody changes the file.
            let map = unsafe { MmapOptions::new().map_copy_read_only(&file) }.expect("mapped");
            assert!(is_mapped(&file).expect("told"));
            let error = refuse(&file, &path).expect_err("mapped");
            assert!(error.to_string().contains(&name.replace('\n', "\\n")), "{error}");
            assert!(error.to_string().contains("\"pread\""), "{error}");
            std::fs::remove_file(&path).expect("removed");
            assert!(is_mapped(&file).expect("told"));
            drop(map);
            refuse(&file, &path).expect("not mapped any more");
        }
        // Mapped by somebody else: the loader.
        assert!(is_mapped(&File::open("/proc/self/exe").expect("opened")).expect("told"));
    }

    #[test]
    fn a_path_stands_for_its_file_where_the_numbers_differ() {
        let line = b"7f00-7f01 r--p 00000000 00:2a 77                 /a b (deleted)";
        let mapping = Mapping::parse(line).expect("a file");
        assert_eq!((mapping.device, mapping.inode), (libc::makedev(0, 0x2a), 77));
        assert_eq!(mapping.path, b"/a b (deleted)");
        assert_eq!(unescaped(br"/a\012b"), Path::new("/a\nb"));
        for other in
            [&b"7f00-7f01 rw-p 00000000 00:00 0 "[..], b"7f00-7f01 r-xp 00000000 00:00 0   [vdso]", b""]
        {
            assert!(Mapping::parse(other).is_none());
        }
    }
}
