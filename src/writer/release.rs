//! Lets go of a file that was replaced, without waiting for it.
//!
//! A rename over a large file frees that file's pages and blocks before it returns, which can take longer than writing
//! the new one took. Held open meanwhile, it is freed when it is closed, and that can be done by another thread.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Below this many bytes a file is freed faster than a thread is started.
const LARGE_BYTES: u64 = 16 << 20;

/// As long as space is waited for that a file gives back.
const PATIENCE: Duration = Duration::from_secs(5);

/// Files that are being closed.
static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// The file at `target`, if there is a large one that nobody else keeps. Needs no right to read it.
pub(super) fn hold(target: &Path) -> Option<File> {
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(target).ok()?;
    let metadata = file.metadata().ok()?;
    (metadata.is_file() && metadata.nlink() == 1 && metadata.len() >= LARGE_BYTES).then_some(file)
}

/// Closes what [`hold`] gave, in the background.
pub(super) fn let_go(old: Option<File>) {
    let Some(old) = old else { return };
    CLOSING.fetch_add(1, Ordering::AcqRel);
    let close = move || {
        drop(old);
        CLOSING.fetch_sub(1, Ordering::AcqRel);
    };
    // Without a thread to spare `close` is dropped here, and the file closed with it.
    if std::thread::Builder::new().name("sft-release".into()).spawn(close).is_err() {
        CLOSING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Waits until the space of the files that were let go of is free; whether there were any.
///
/// Gives up after a while: in the child of a fork, the threads that it waits for do not exist.
pub(super) fn wait() -> bool {
    if CLOSING.load(Ordering::Acquire) == 0 {
        return false;
    }
    let deadline = Instant::now() + PATIENCE;
    while CLOSING.load(Ordering::Acquire) != 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(folder: &tempfile::TempDir, bytes: u64) -> std::path::PathBuf {
        let path = folder.path().join(bytes.to_string());
        File::create(&path).and_then(|file| file.set_len(bytes)).expect("a file");
        path
    }

    #[test]
    fn only_a_large_file_with_one_name_is_held() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(hold(&file_of(&folder, LARGE_BYTES - 1)).is_none());
        assert!(hold(&folder.path().join("nothing")).is_none());
        assert!(hold(folder.path()).is_none());
        let large = file_of(&folder, LARGE_BYTES);
        assert!(hold(&large).is_some());
        std::fs::hard_link(&large, folder.path().join("other")).expect("a link");
        assert!(hold(&large).is_none());
    }

    #[test]
    fn what_is_let_go_of_is_closed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = file_of(&folder, LARGE_BYTES);
        let is_open = || {
            std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten().any(|entry| {
                std::fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(folder.path()))
            })
        };
        let held = hold(&path);
        assert!(is_open());
        let_go(held);
        wait();
        assert!(!is_open());
    }
}
