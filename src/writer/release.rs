//! Lets go of a file that was replaced, without waiting for it.
//!
//! A rename over a large file frees that file's pages and blocks before it returns, which can take longer than writing
//! the new one took. Held open meanwhile, it is freed when it is closed, and that can be done by another thread.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Below this many bytes a file is freed faster than a thread is started.
const LARGE_BYTES: u64 = 16 << 20;

/// As long as space is waited for that a file gives back.
const PATIENCE: Duration = Duration::from_secs(5);

/// Filesystems that free a file when it is closed. Others need not be asked to keep one open: NFS, for instance, would
/// have to give it another name in the folder.
const LOCAL: [libc::c_long; 5] = [
    libc::EXT4_SUPER_MAGIC as libc::c_long,
    libc::XFS_SUPER_MAGIC as libc::c_long,
    libc::BTRFS_SUPER_MAGIC as libc::c_long,
    libc::TMPFS_MAGIC as libc::c_long,
    libc::OVERLAYFS_SUPER_MAGIC as libc::c_long,
];

/// Files that are being closed, and the process that does it: a fork has the number, but not the threads.
static CLOSING: AtomicUsize = AtomicUsize::new(0);
static CLOSER: AtomicU32 = AtomicU32::new(0);

/// The file at `target`, if there is a large one that nobody else keeps. Needs no right to read it.
pub(super) fn hold(target: &Path) -> Option<File> {
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(target).ok()?;
    let metadata = file.metadata().ok()?;
    let worth_it = metadata.is_file() && metadata.nlink() == 1 && metadata.len() >= LARGE_BYTES;
    (worth_it && is_local(&file)).then_some(file)
}

fn is_local(file: &File) -> bool {
    // SAFETY: a plain struct of integers, for which zeros are a value.
    let mut told: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a descriptor that `file` keeps open, and a place for the answer.
    let status = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut told) };
    status == 0 && LOCAL.contains(&(told.f_type as libc::c_long))
}

/// Closes what [`hold`] gave, in the background.
pub(super) fn let_go(old: Option<File>) {
    let Some(old) = old else { return };
    if CLOSER.swap(std::process::id(), Ordering::AcqRel) != std::process::id() {
        CLOSING.store(0, Ordering::Release);
    }
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

/// Waits until the space of the files that were let go of is free, but not for ever; whether there were any.
pub(super) fn wait() -> bool {
    if CLOSER.load(Ordering::Acquire) != std::process::id() || CLOSING.load(Ordering::Acquire) == 0 {
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
