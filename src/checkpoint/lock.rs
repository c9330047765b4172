//! The lock that a save holds while it renames files, and that an open waits for if it finds no checkpoint.
//!
//! It is a file lock on a hidden file that exists only during that time. Only users who may write to the directory can open
//! the file, so a user who may only read cannot block a save. All waits have a limit, because the process with the lock may
//! be stopped. If it was killed, the next save uses its file and removes it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::directory::{Directory, identity};
use crate::write::atomic::Attributes;

const NAME: &str = ".safetensors.lock";

/// How long a save waits: longer than a commit of many files on a slow disk takes.
const SAVE_WAIT: Duration = Duration::from_secs(60);

/// How long an open waits if it finds no checkpoint.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// How long `EACCES` may mean that another user has just created the file and not set its permissions yet.
const PERMISSIONS_WAIT: Duration = Duration::from_secs(1);

/// The first and the longest pause between two attempts to lock.
const PAUSES: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(10));

/// The lock of a directory, held until this is dropped.
#[derive(Debug)]
pub(super) struct SaveLock {
    directory: Arc<Directory>,
    file: File,
}

impl SaveLock {
    /// Locks `directory` for a save that has waited since `since`. Returns `None` if another save still has the lock at
    /// `deadline`. Succeeds at once on a filesystem without locks.
    pub(super) fn acquire(
        directory: &Arc<Directory>,
        since: Instant,
        deadline: Option<Instant>,
    ) -> Result<Option<SaveLock>> {
        SaveLock::acquire_within(directory, since, deadline, SAVE_WAIT)
            .map_err(|source| lock_error(directory.path(), source))
    }

    fn acquire_within(
        directory: &Arc<Directory>,
        since: Instant,
        deadline: Option<Instant>,
        limit: Duration,
    ) -> io::Result<Option<SaveLock>> {
        let mut pauses = Pauses::new();
        loop {
            if let Some(lock) = SaveLock::try_acquire(directory, since)? {
                return Ok(Some(lock));
            }
            if since.elapsed() >= limit {
                return Err(io::Error::from_raw_os_error(libc::EWOULDBLOCK));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
            pauses.sleep();
        }
    }

    /// Returns `None` if another save has the lock.
    fn try_acquire(directory: &Arc<Directory>, since: Instant) -> io::Result<Option<SaveLock>> {
        let Some((file, is_new)) = open_or_create(directory, since)? else { return Ok(None) };
        let lock = || match file.try_lock().map_err(io::Error::from) {
            // If not present, it was removed by the save that had locked it.
            Ok(()) => is_present(directory, &file),
            Err(error) if is_held(&error) => Ok(false),
            Err(error) if has_no_locks(&error) => Ok(true),
            Err(error) => Err(error),
        };
        match lock() {
            Ok(is_locked) => Ok(is_locked.then(|| SaveLock { directory: Arc::clone(directory), file })),
            Err(error) => {
                if is_new {
                    let _ = directory.remove(OsStr::new(NAME));
                }
                Err(error)
            }
        }
    }
}

impl Drop for SaveLock {
    fn drop(&mut self) {
        // If this fails, the next save uses the file.
        let _ = self.directory.remove(OsStr::new(NAME));
        // Closing it is not enough: forked processes may share the descriptor.
        let _ = self.file.unlock();
    }
}

/// Opens the file of `directory`, or creates it. Returns whether it was created, or `None` if another process creates or
/// removes it at this moment.
fn open_or_create(directory: &Directory, since: Instant) -> io::Result<Option<(File, bool)>> {
    let open = |flags| {
        // NFS locks only files that are open for writing.
        let flags = flags | libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        directory.open_at(OsStr::new(NAME), flags, 0o600)
    };
    match open(0) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error)
            if error.kind() == io::ErrorKind::PermissionDenied && since.elapsed() < PERMISSIONS_WAIT =>
        {
            return Ok(None);
        }
        opened => return opened.map(|file| Some((file, false))),
    }
    let file = match open(libc::O_CREAT | libc::O_EXCL) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        created => created?,
    };
    let opened = Attributes::for_lock(directory).and_then(|attributes| attributes.inherit(&file));
    opened.inspect_err(|_| drop(directory.remove(OsStr::new(NAME))))?;
    Ok(Some((file, true)))
}

/// Returns whether the name still refers to `file`.
fn is_present(directory: &Directory, file: &File) -> io::Result<bool> {
    let Some(entry) = directory.open_entry(OsStr::new(NAME))? else { return Ok(false) };
    Ok(identity(&entry.metadata()?) == identity(&file.metadata()?))
}

#[derive(Debug)]
pub(super) enum WaitOutcome {
    /// No save holds the lock.
    NoSave,
    /// The save that held the lock has ended.
    Ended,
    /// A save still holds the lock at the deadline.
    StillLocked,
    /// A save has held the lock for as long as an open waits.
    TimedOut,
}

/// Waits while a save holds the lock of `directory`. `since` is when the first wait began.
pub(super) fn wait_for_save(directory: &Directory, since: Instant, deadline: Option<Instant>) -> WaitOutcome {
    let (mut pauses, mut waited) = (Pauses::new(), false);
    while is_saving(directory) {
        waited = true;
        if since.elapsed() >= OPEN_WAIT {
            return WaitOutcome::TimedOut;
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return WaitOutcome::StillLocked;
        }
        pauses.sleep();
    }
    if waited { WaitOutcome::Ended } else { WaitOutcome::NoSave }
}

/// Returns whether a save holds the lock. If this process may not open the file, assumes so: a killed save may have left it,
/// but nobody can tell.
fn is_saving(directory: &Directory) -> bool {
    match directory.open_at(OsStr::new(NAME), libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK, 0) {
        // Released at once, so that readers never block a save.
        Ok(file) => file.try_lock_shared().is_err_and(|error| is_held(&error.into())),
        Err(error) => {
            error.kind() == io::ErrorKind::PermissionDenied
                && matches!(directory.open_entry(OsStr::new(NAME)), Ok(Some(_)))
        }
    }
}

struct Pauses(Duration);

impl Pauses {
    fn new() -> Pauses {
        Pauses(PAUSES.0)
    }

    fn sleep(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 2).min(PAUSES.1);
    }
}

fn lock_error(directory: &Path, source: io::Error) -> Error {
    let (kind, file) = (source.kind(), directory.join(NAME));
    let error = Error::io("lock the directory", directory, source);
    match kind {
        io::ErrorKind::WouldBlock => error.with_remedy(&format!(
            "another save has had it locked for {} seconds (lslocks lists its process): save again when it has ended",
            SAVE_WAIT.as_secs()
        )),
        io::ErrorKind::PermissionDenied => error.with_remedy(&format!(
            "{} belongs to another user: if no save of theirs is running, have it removed",
            file.display()
        )),
        _ => error,
    }
}

fn is_held(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Returns whether the error means that the filesystem or the kernel has no file locks.
fn has_no_locks(error: &io::Error) -> bool {
    let numbers = [libc::ENOLCK, libc::EOPNOTSUPP, libc::EINVAL, libc::EBADF, libc::ENOSYS, libc::EPERM];
    error.raw_os_error().is_some_and(|number| numbers.contains(&number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use tempfile::TempDir;

    fn directory() -> (TempDir, Arc<Directory>) {
        let directory = tempfile::tempdir().expect("a directory");
        let opened = Directory::open(directory.path()).expect("opened");
        (directory, Arc::new(opened))
    }

    fn acquire(directory: &Arc<Directory>) -> io::Result<Option<SaveLock>> {
        SaveLock::acquire_within(directory, Instant::now(), None, Duration::from_millis(20))
    }

    fn locked(directory: &Arc<Directory>) -> SaveLock {
        acquire(directory).expect("no error").expect("no deadline")
    }

    #[test]
    fn one_saves_and_leaves_nothing() {
        let (directory, held) = directory();
        let lock = locked(&held);
        assert_eq!(acquire(&held).expect_err("held").kind(), io::ErrorKind::WouldBlock);
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(SaveLock::acquire(&held, Instant::now(), Some(soon)).expect("no error yet").is_none());
        assert!(matches!(wait_for_save(&held, Instant::now(), Some(soon)), WaitOutcome::StillLocked));
        let long_ago = Instant::now() - OPEN_WAIT;
        assert!(matches!(wait_for_save(&held, long_ago, None), WaitOutcome::TimedOut));
        drop(lock);
        assert!(matches!(wait_for_save(&held, Instant::now(), None), WaitOutcome::NoSave));
        assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 0);
        drop(locked(&held));
    }

    #[test]
    fn a_copied_descriptor_does_not_keep_the_lock() {
        let (_directory, held) = directory();
        let lock = locked(&held);
        // As a fork makes it.
        let copy = lock.file.try_clone().expect("copied");
        drop(lock);
        drop((locked(&held), copy));
    }

    #[test]
    fn the_file_of_a_killed_save_is_used_again() {
        let (directory, held) = directory();
        fs::write(directory.path().join(NAME), "").expect("written");
        assert!(!is_saving(&held));
        drop(locked(&held));
        assert!(!directory.path().join(NAME).exists());
    }

    #[test]
    fn a_lock_on_a_removed_file_does_not_count() {
        let (directory, held) = directory();
        let first = locked(&held);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| SaveLock::acquire(&held, Instant::now(), None));
            std::thread::sleep(Duration::from_millis(100));
            drop(first);
            let second = waiting.join().expect("no panic").expect("free").expect("waited for");
            assert!(
                is_present(&held, &second.file).expect("looked at") && directory.path().join(NAME).exists()
            );
            assert_eq!(acquire(&held).expect_err("held").kind(), io::ErrorKind::WouldBlock);
        });
    }

    #[test]
    fn only_writers_of_the_directory_can_open_it() {
        let (directory, held) = directory();
        for (of_directory, of_file) in
            [(0o755, 0o600), (0o700, 0o600), (0o775, 0o660), (0o1777, 0o666), (0o757, 0o606)]
        {
            fs::set_permissions(directory.path(), Permissions::from_mode(of_directory)).expect("set");
            let lock = locked(&held);
            assert_eq!(lock.file.metadata().expect("told").mode() & 0o7777, of_file, "{of_directory:o}");
        }
    }

    #[test]
    fn links_are_not_followed() {
        let (directory, held) = directory();
        symlink("elsewhere", directory.path().join(NAME)).expect("linked");
        assert_eq!(acquire(&held).expect_err("a link").raw_os_error(), Some(libc::ELOOP));
        assert!(!directory.path().join("elsewhere").exists());
    }

    #[test]
    fn errors_name_the_lock() {
        let error = |number| lock_error(Path::new("a/b"), io::Error::from_raw_os_error(number));
        let held = error(libc::EWOULDBLOCK);
        assert_eq!((held.kind(), held.os_error()), (ErrorKind::Io, Some(libc::EWOULDBLOCK)));
        let text = held.to_string();
        assert!(text.contains("cannot lock the directory a/b") && text.contains("for 60 seconds"), "{text}");
        assert!(error(libc::EACCES).to_string().contains("a/b/.safetensors.lock belongs to another user"));
        assert!(!error(libc::EIO).to_string().contains("another"));
        assert!(has_no_locks(&io::Error::from_raw_os_error(libc::ENOLCK)));
        assert!(!has_no_locks(&io::Error::from_raw_os_error(libc::EIO)));
    }
}
