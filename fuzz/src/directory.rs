//! The temporary directory of the targets: one per thread, removed when the thread ends.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether files can be mapped and saved. Miri supports neither file mappings nor unnamed files.
pub const HAS_FILES: bool = !cfg!(miri);

thread_local! {
    static DIRECTORY: tempfile::TempDir = tempfile::tempdir().expect("a directory");
}

/// Calls `use_it` with the path of a file in the directory.
pub fn with_path<T>(name: &str, use_it: impl FnOnce(&Path, &CStr) -> T) -> T {
    DIRECTORY.with(|directory| {
        let path = directory.path().join(name);
        let text = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
        use_it(&path, &text)
    })
}

/// Replaces a file instead of overwriting it, because it may be mapped.
pub fn replace(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).or_else(|error| if path.exists() { Err(error) } else { Ok(()) }).expect("removed");
    fs::write(path, bytes).expect("written");
}

/// Asserts that the directory contains only the file at `path`.
pub fn assert_alone(path: &Path) {
    let directory = path.parent().expect("it is in a directory");
    let found: Vec<_> = fs::read_dir(directory)
        .expect("the directory")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert_eq!(found, [path]);
}
