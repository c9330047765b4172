//! The lock on a folder (`flock`) that a save holds while names in it change, and that who finds no checkpoint there
//! waits for.
//!
//! What is done under it, `write` and [`Checkpoint::open`](super::Checkpoint::open) say. Nobody waits for ever: who
//! holds it may have been stopped, and a program may have locked the folder for a purpose of its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::is_at;
use crate::error::{Error, Result};
use crate::flock::flock;

/// How long a save waits for others: longer than a commit takes that gives names to many files on a slow disk.
const SAVE_WAIT: Duration = Duration::from_secs(300);

/// How long an open waits for a save, when there is nothing to open.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// How often a folder can have been replaced while its lock was waited for.
const MOST_REPLACED: usize = 20;

/// How long until the lock is asked for again, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(10));

/// A folder that is locked until this is dropped.
#[derive(Debug)]
pub(super) struct FolderLock {
    folder: File,
}

impl FolderLock {
    /// For who changes names in `folder`. `None` where its filesystem has no locks.
    pub(super) fn for_save(folder: &Path) -> Result<Option<FolderLock>> {
        FolderLock::take(folder, libc::LOCK_EX, SAVE_WAIT).map_err(|source| refused(folder, source))
    }

    /// For who looks for a checkpoint in `folder`: `None` where it cannot be locked, or not in time, which is no reason
    /// not to look.
    pub(super) fn for_open(folder: &Path) -> Option<FolderLock> {
        FolderLock::take(folder, libc::LOCK_SH, OPEN_WAIT).ok().flatten()
    }

    /// Waits for at most `wait`; then the error is `EWOULDBLOCK`.
    fn take(folder: &Path, operation: libc::c_int, wait: Duration) -> io::Result<Option<FolderLock>> {
        let (begin, (mut pause, longest)) = (Instant::now(), PAUSES);
        let open =
            || OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC).open(folder);
        let (mut opened, mut replaced) = (open()?, 0);
        loop {
            match flock(&opened, operation | libc::LOCK_NB) {
                Ok(()) if is_at(&opened, folder) => return Ok(Some(FolderLock { folder: opened })),
                // Not one folder after the other, but a filesystem that gives one file several numbers.
                Ok(()) if replaced == MOST_REPLACED => return Ok(None),
                // That of a folder which was removed, or replaced, meanwhile.
                Ok(()) => (opened, replaced) = (open()?, replaced + 1),
                Err(error) if has_no_locks(&error) => return Ok(None),
                Err(error)
                    if ![io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) =>
                {
                    return Err(error);
                }
                Err(_) => {}
            }
            if begin.elapsed() >= wait {
                return Err(io::Error::from_raw_os_error(libc::EWOULDBLOCK));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(longest);
        }
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // To close it is not enough: a process that was forked meanwhile has the descriptor too. Where it cannot be
        // unlocked, there is nobody to tell.
        let _ = flock(&self.folder, libc::LOCK_UN);
    }
}

fn refused(folder: &Path, source: io::Error) -> Error {
    let is_held = source.kind() == io::ErrorKind::WouldBlock;
    let error = Error::io("lock the folder", folder, source);
    if !is_held {
        return error;
    }
    error.with_remedy(&format!(
        "another process has had it locked for {} minutes, to save a checkpoint or by a lock of its own (lslocks names \
         it): save again when it has ended",
        SAVE_WAIT.as_secs() / 60
    ))
}

/// What filesystems and kernels without such locks answer.
fn has_no_locks(error: &io::Error) -> bool {
    let answers = [libc::ENOLCK, libc::EOPNOTSUPP, libc::EINVAL, libc::EBADF, libc::ENOSYS, libc::EPERM];
    error.raw_os_error().is_some_and(|number| answers.contains(&number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::fs;

    fn take(folder: &Path, operation: libc::c_int) -> io::Result<Option<FolderLock>> {
        FolderLock::take(folder, operation, Duration::from_millis(20))
    }

    fn is_held(outcome: io::Result<Option<FolderLock>>) -> bool {
        outcome.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    #[test]
    fn one_saves_or_several_look() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = folder.path();
        let saving = take(at, libc::LOCK_EX).expect("free").expect("locks");
        assert!(is_held(take(at, libc::LOCK_EX)) && is_held(take(at, libc::LOCK_SH)));
        drop(saving);
        let looking = [take(at, libc::LOCK_SH), take(at, libc::LOCK_SH)].map(|lock| lock.expect("free"));
        assert!(is_held(take(at, libc::LOCK_EX)));
        drop(looking);
        take(at, libc::LOCK_EX).expect("free again").expect("locks");
    }

    #[test]
    fn a_copy_of_the_descriptor_holds_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let lock = take(folder.path(), libc::LOCK_EX).expect("free").expect("locks");
        // As a fork makes it.
        let copy = lock.folder.try_clone().expect("copied");
        drop(lock);
        take(folder.path(), libc::LOCK_EX).expect("free again").expect("locks");
        drop(copy);
    }

    #[test]
    fn the_lock_is_that_of_the_folder_which_is_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let (at, aside) = (folder.path().join("c"), folder.path().join("aside"));
        fs::create_dir(&at).expect("made");
        let first = take(&at, libc::LOCK_EX).expect("free").expect("locks");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| FolderLock::take(&at, libc::LOCK_EX, SAVE_WAIT));
            std::thread::sleep(Duration::from_millis(200));
            fs::rename(&at, &aside).expect("renamed");
            fs::create_dir(&at).expect("made");
            drop(first);
            let second = waiting.join().expect("no panic").expect("free").expect("locks");
            assert!(is_at(&second.folder, &at));
            assert!(is_held(take(&at, libc::LOCK_EX)));
        });
        let error = take(&folder.path().join("gone"), libc::LOCK_EX).expect_err("not there");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn who_waited_in_vain_is_told_for_what() {
        let error = |number| refused(Path::new("a/b"), io::Error::from_raw_os_error(number));
        let held = error(libc::EWOULDBLOCK);
        assert_eq!((held.kind(), held.os_error()), (ErrorKind::Io, Some(libc::EWOULDBLOCK)));
        let text = held.to_string();
        assert!(
            text.contains("cannot lock the folder a/b") && text.contains("locked for 5 minutes"),
            "{text}"
        );
        assert!(!error(libc::EIO).to_string().contains("another process"));
    }

    #[test]
    fn only_what_says_so_has_no_locks() {
        let says = |number| has_no_locks(&io::Error::from_raw_os_error(number));
        let lacking = [libc::ENOLCK, libc::EOPNOTSUPP, libc::EINVAL, libc::EBADF, libc::ENOSYS, libc::EPERM];
        assert!(lacking.map(says) == [true; 6]);
        assert!([libc::EIO, libc::EACCES, libc::EWOULDBLOCK, libc::EINTR].map(says) == [false; 4]);
    }
}
