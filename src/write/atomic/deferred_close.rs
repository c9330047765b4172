//! Lets go of a file that was replaced, without waiting for it.
//!
//! A rename over a large file frees that file's pages and blocks before it returns, which can take longer than writing
//! the new one took. Guard open meanwhile, it is freed when it is closed, and that can be done by another thread.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sys::filesystem::is_local;
use crate::sys::threads::threads;

/// Below this many bytes a file is freed faster than a thread is started.
const LARGE_BYTES: u64 = 16 << 20;

/// As long as space is waited for that a file gives back.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many files are being closed.
static CLOSING: Closing = Closing(AtomicU64::new(0));

/// A number of files, and in the upper half the process that closes them: a fork inherits the number, but not the
/// threads.
struct Closing(AtomicU64);

impl Closing {
    fn owner() -> u64 {
        u64::from(std::process::id()) << 32
    }

    /// The number of this process, given what is stored.
    fn own(stored: u64) -> u64 {
        stored.checked_sub(Self::owner()).filter(|&count| count <= u64::from(u32::MAX)).unwrap_or(0)
    }

    fn count(&self) -> u64 {
        Self::own(self.0.load(Ordering::Acquire))
    }

    fn begin(&self) {
        self.change(|count| count + 1);
    }

    fn end(&self) {
        self.change(|count| count.saturating_sub(1));
    }

    fn change(&self, change: impl Fn(u64) -> u64) {
        let changed = |stored| Some(Self::owner() + change(Self::own(stored)));
        // Never refused, as there is always a new value.
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
    }
}

/// The `entry` that is about to be replaced (`O_PATH`), if it is a large file that nobody else keeps, on a filesystem
/// that frees a file when it is closed: NFS, for instance, would have to give it another name in the directory.
pub(crate) fn keep_open(entry: Option<File>) -> Option<File> {
    let file = entry?;
    let metadata = file.metadata().ok()?;
    let worth_it = metadata.is_file() && metadata.nlink() == 1 && metadata.len() >= LARGE_BYTES;
    (worth_it && is_local(&file)).then_some(file)
}

/// Closes what [`keep_open`] gave, in the background.
pub(crate) fn close_later(old: Option<File>) {
    let Some(old) = old else { return };
    // Where the caller alone may work, `old` is closed here.
    if !threads().is_ok_and(|most| most != 1) {
        return;
    }
    CLOSING.begin();
    let close = move || {
        drop(old);
        CLOSING.end();
    };
    // Without a thread to spare `close` is dropped here, and the file closed with it.
    if std::thread::Builder::new().name("sft-release".into()).spawn(close).is_err() {
        CLOSING.end();
    }
}

/// Waits until the space of the files that were let go of is free, but not for ever; whether there were any.
pub(crate) fn wait() -> bool {
    if CLOSING.count() == 0 {
        return false;
    }
    let deadline = Instant::now() + PATIENCE;
    while CLOSING.count() != 0 && Instant::now() < deadline {
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

    fn hold_at(path: &std::path::Path) -> Option<File> {
        let (directory, name) = Directory::open_parent(path).expect("a directory");
        keep_open(directory.open_entry(&name).expect("looked at"))
    }

    #[test]
    fn only_a_large_file_with_one_name_is_held() {
        let directory = tempfile::tempdir().expect("a directory");
        assert!(hold_at(&file_of(&directory, LARGE_BYTES - 1)).is_none());
        assert!(hold_at(&directory.path().join("nothing")).is_none());
        assert!(hold_at(directory.path()).is_none());
        let large = file_of(&directory, LARGE_BYTES);
        assert!(hold_at(&large).is_some());
        std::fs::hard_link(&large, directory.path().join("other")).expect("a link");
        assert!(hold_at(&large).is_none());
    }

    #[test]
    fn what_another_process_closes_does_not_count() {
        let inherited = (Closing::owner() ^ (1 << 32)) + 3;
        let closing = Closing(AtomicU64::new(inherited));
        assert_eq!(closing.count(), 0);
        closing.begin();
        closing.begin();
        assert_eq!(closing.count(), 2);
        closing.end();
        closing.end();
        closing.end();
        assert_eq!(closing.count(), 0);
    }

    #[test]
    fn threads_that_begin_and_end_leave_nothing_behind() {
        let closing = Closing(AtomicU64::new(7));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        closing.begin();
                        closing.end();
                    }
                });
            }
        });
        assert_eq!(closing.count(), 0);
    }

    #[test]
    fn what_is_let_go_of_is_closed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = file_of(&directory, LARGE_BYTES);
        let is_open = || {
            std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten().any(|entry| {
                std::fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(directory.path()))
            })
        };
        let held = hold_at(&path);
        assert!(is_open());
        close_later(held);
        wait();
        assert!(!is_open());
    }
}
