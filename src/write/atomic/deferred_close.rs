//! Frees a file that was replaced in the background.
//!
//! A rename over a large file frees that file's pages and blocks before it returns, which can take longer than writing
//! the new one. If the old file is open, it is freed when it is closed, and another thread can do that.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::preallocate;
use crate::sys::filesystem::is_local;
use crate::sys::signals::block_write_signals;
use crate::sys::threads::threads;

/// A smaller file is freed faster than a thread is started.
const LARGE_BYTES: u64 = 16 << 20;

/// How long to wait for the space of files that are being closed.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// How many files are being closed. A forked child may inherit a count that nobody decrements; it then waits in vain once
/// its disk is full.
static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// Returns `entry` (`O_PATH`), which is about to be replaced, if it is a large file with one name on a filesystem that
/// frees an open file when it is closed. NFS instead renames it in the directory.
pub(crate) fn keep_open(entry: Option<File>) -> Option<File> {
    let file = entry?;
    let metadata = file.metadata().ok()?;
    let worth_it = metadata.is_file() && metadata.nlink() == 1 && metadata.len() >= LARGE_BYTES;
    (worth_it && is_local(&file)).then_some(file)
}

/// Closes the file of [`keep_open`] in the background.
pub(crate) fn close_later(old: Option<File>) {
    let Some(old) = old else { return };
    // If no other thread may work, `old` is closed here.
    if !threads().is_ok_and(|most| most != 1) {
        return;
    }
    CLOSING.fetch_add(1, Ordering::AcqRel);
    let close = move || {
        drop(old);
        CLOSING.fetch_sub(1, Ordering::AcqRel);
    };
    // If no thread can be started, `close` is dropped here, and the file closed with it.
    if std::thread::Builder::new().name("sft-release".into()).spawn(close).is_err() {
        CLOSING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Reserves the space of a new file of `length` bytes. If there is too little, waits for files that are being closed.
pub(crate) fn reserve(file: &File, length: u64) -> io::Result<()> {
    let reserve = || block_write_signals(|| preallocate::reserve(file, length));
    let full = [libc::ENOSPC, libc::EDQUOT];
    match reserve() {
        Err(error) if error.raw_os_error().is_some_and(|number| full.contains(&number)) && wait() => {
            reserve()
        }
        reserved => reserved,
    }
}

/// Waits until no file is being closed, or for [`MAX_WAIT`]; returns whether there was one.
fn wait() -> bool {
    let is_closing = || CLOSING.load(Ordering::Acquire) != 0;
    if !is_closing() {
        return false;
    }
    let deadline = Instant::now() + MAX_WAIT;
    while is_closing() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::directory::Directory;

    fn file_of(directory: &tempfile::TempDir, bytes: u64) -> std::path::PathBuf {
        let path = directory.path().join(bytes.to_string());
        File::create(&path).and_then(|file| file.set_len(bytes)).expect("a file");
        path
    }

    fn kept_at(path: &std::path::Path) -> Option<File> {
        let (directory, name) = Directory::open_parent(path).expect("a directory");
        keep_open(directory.open_entry(&name).expect("looked at"))
    }

    #[test]
    fn only_a_large_file_with_one_name_is_kept_open() {
        let directory = tempfile::tempdir().expect("a directory");
        assert!(kept_at(&file_of(&directory, LARGE_BYTES - 1)).is_none());
        assert!(kept_at(&directory.path().join("nothing")).is_none());
        assert!(kept_at(directory.path()).is_none());
        let large = file_of(&directory, LARGE_BYTES);
        assert!(kept_at(&large).is_some());
        std::fs::hard_link(&large, directory.path().join("other")).expect("a link");
        assert!(kept_at(&large).is_none());
    }

    #[test]
    fn a_file_is_closed_in_the_background() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = file_of(&directory, LARGE_BYTES);
        let is_open = || {
            std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten().any(|entry| {
                std::fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(directory.path()))
            })
        };
        let kept = kept_at(&path);
        assert!(is_open());
        close_later(kept);
        wait();
        assert!(!is_open());
    }
}
