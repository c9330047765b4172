//! The lock that a save holds while names in a directory change, and that an open which finds no checkpoint waits for.
//!
//! It is a lock (`File::lock`) on a hidden file, which is there for as long as names change. Whoever may write in the directory
//! may open that file, and nobody else: a user who may only read the directory cannot hold up a save. Nobody waits for
//! ever: the process that has the lock may have been stopped. The file of a process that was killed is used, and removed,
//! by the next save.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::directory::{Directory, identity};
use crate::write::atomic::Attributes;

/// The name of the file.
const NAME: &str = ".safetensors.lock";

/// How long a save waits for others: longer than a commit takes that gives names to many files on a slow disk.
const SAVE_WAIT: Duration = Duration::from_secs(60);

/// How long an open waits for a save, when there is nothing to open.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// How long a file that cannot be opened may be one that another user has made just now, and not opened to others yet.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long until the lock is asked for again, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(10));

/// A directory that is locked until this is dropped.
#[derive(Debug)]
pub(super) struct SaveLock {
    directory: Arc<Directory>,
    file: File,
}

impl SaveLock {
    /// For a save that changes names in `directory`, and that has waited since `since`; `None` if another save still has
    /// the lock at `until`. On a filesystem without locks nobody is waited for.
    pub(super) fn take(
        directory: &Arc<Directory>,
        since: Instant,
        until: Option<Instant>,
    ) -> Result<Option<SaveLock>> {
        SaveLock::take_within(directory, since, until, SAVE_WAIT)
            .map_err(|source| refused(directory.path(), source))
    }

    fn take_within(
        directory: &Arc<Directory>,
        since: Instant,
        until: Option<Instant>,
        limit: Duration,
    ) -> io::Result<Option<SaveLock>> {
        let mut pauses = Pauses::new();
        loop {
            if let Some(lock) = SaveLock::try_take(directory, since)? {
                return Ok(Some(lock));
            }
            if since.elapsed() >= limit {
                return Err(io::Error::from_raw_os_error(libc::EWOULDBLOCK));
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(None);
            }
            pauses.sleep();
        }
    }

    /// `None` if another save has the lock.
    fn try_take(directory: &Arc<Directory>, since: Instant) -> io::Result<Option<SaveLock>> {
        let Some((file, is_new)) = open_or_make(directory, since)? else { return Ok(None) };
        let lock = || match file.try_lock().map_err(io::Error::from) {
            // Else it is that of a save which has ended, and has removed it.
            Ok(()) => is_there(directory, &file),
            Err(error) if is_held(&error) => Ok(false),
            Err(error) if has_no_locks(&error) => Ok(true),
            Err(error) => Err(error),
        };
        match lock() {
            Ok(is_locked) => Ok(is_locked.then(|| SaveLock { directory: Arc::clone(directory), file })),
            Err(error) => {
                if is_new {
                    // The error is already on its way.
                    let _ = directory.remove(OsStr::new(NAME));
                }
                Err(error)
            }
        }
    }
}

impl Drop for SaveLock {
    fn drop(&mut self) {
        // There is nobody to tell: the next save uses a file that could not be removed.
        let _ = self.directory.remove(OsStr::new(NAME));
        // To close it is not enough: a process that was forked meanwhile has the descriptor too.
        let _ = self.file.unlock();
    }
}

/// Opens the file of `directory`, or makes it, and returns whether it did; `None` if somebody else makes or removes it at
/// this moment.
fn open_or_make(directory: &Directory, since: Instant) -> io::Result<Option<(File, bool)>> {
    let open = |flags| {
        // For writing, as NFS gives the lock for such a file alone.
        let flags = flags | libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NONBLOCK;
        directory.open_at(OsStr::new(NAME), flags, 0o600)
    };
    match open(0) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && since.elapsed() < PATIENCE => {
            return Ok(None);
        }
        opened => return opened.map(|file| Some((file, false))),
    }
    let file = match open(libc::O_CREAT | libc::O_EXCL) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        made => made?,
    };
    let opened = Attributes::for_lock(directory).and_then(|attributes| attributes.inherit(&file));
    opened.inspect_err(|_| drop(directory.remove(OsStr::new(NAME))))?;
    Ok(Some((file, true)))
}

/// Whether `file` is the one that has the name.
fn is_there(directory: &Directory, file: &File) -> io::Result<bool> {
    let Some(entry) = directory.open_entry(OsStr::new(NAME))? else { return Ok(false) };
    Ok(identity(&entry.metadata()?) == identity(&file.metadata()?))
}

/// What an open that finds no checkpoint does about saves that may be putting one there.
#[derive(Debug)]
pub(super) enum Waited {
    /// No save is changing names, now: look again.
    Free,
    /// One still is, at the moment until which it was to be waited for.
    Guard,
    /// One has been for as long as an open waits, and may be stopped.
    InVain,
}

/// Waits for the save that is changing names in `directory`, if one is. `since` is when the first wait began.
pub(super) fn wait_for_save(directory: &Directory, since: Instant, until: Option<Instant>) -> Waited {
    let mut pauses = Pauses::new();
    while is_saving(directory) {
        if since.elapsed() >= OPEN_WAIT {
            return Waited::InVain;
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return Waited::Guard;
        }
        pauses.sleep();
    }
    Waited::Free
}

/// Whether a save is changing names. A file that this process may not open may be one that a killed save has left, which
/// cannot be told from the other.
fn is_saving(directory: &Directory) -> bool {
    match directory.open_at(OsStr::new(NAME), libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK, 0) {
        // Not kept, so that no number of those who look keeps a save from beginning.
        Ok(file) => file.try_lock_shared().is_err_and(|error| is_held(&error.into())),
        Err(error) => {
            error.kind() == io::ErrorKind::PermissionDenied
                && matches!(directory.open_entry(OsStr::new(NAME)), Ok(Some(_)))
        }
    }
}

/// Moments that get longer.
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

fn refused(directory: &Path, source: io::Error) -> Error {
    let (kind, file) = (source.kind(), directory.join(NAME));
    let error = Error::io("lock the directory", directory, source);
    match kind {
        io::ErrorKind::WouldBlock => error.with_remedy(&format!(
            "another save has had it locked for {} seconds (lslocks names its process): save again when it has ended",
            SAVE_WAIT.as_secs()
        )),
        io::ErrorKind::PermissionDenied => error.with_remedy(&format!(
            "{} is another user's: if no save of theirs is under way, have it removed",
            file.display()
        )),
        _ => error,
    }
}

fn is_held(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
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
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use tempfile::TempDir;

    fn directory() -> (TempDir, Arc<Directory>) {
        let directory = tempfile::tempdir().expect("a directory");
        let held = Directory::open(directory.path()).expect("opened");
        (directory, Arc::new(held))
    }

    fn take(directory: &Arc<Directory>) -> io::Result<Option<SaveLock>> {
        SaveLock::take_within(directory, Instant::now(), None, Duration::from_millis(20))
    }

    fn taken(directory: &Arc<Directory>) -> SaveLock {
        take(directory).expect("free").expect("waited without an end")
    }

    #[test]
    fn one_saves_and_leaves_nothing() {
        let (directory, held) = directory();
        let lock = taken(&held);
        assert_eq!(take(&held).expect_err("held").kind(), io::ErrorKind::WouldBlock);
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(SaveLock::take(&held, Instant::now(), Some(soon)).expect("no error yet").is_none());
        assert!(matches!(wait_for_save(&held, Instant::now(), Some(soon)), Waited::Guard));
        let long_ago = Instant::now() - OPEN_WAIT;
        assert!(matches!(wait_for_save(&held, long_ago, None), Waited::InVain));
        drop(lock);
        assert!(matches!(wait_for_save(&held, Instant::now(), None), Waited::Free));
        assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 0);
        drop(taken(&held));
    }

    #[test]
    fn a_copy_of_the_descriptor_holds_nothing() {
        let (_directory, held) = directory();
        let lock = taken(&held);
        // As a fork makes it.
        let copy = lock.file.try_clone().expect("copied");
        drop(lock);
        drop((taken(&held), copy));
    }

    #[test]
    fn the_file_of_a_killed_save_is_used_again() {
        let (directory, held) = directory();
        fs::write(directory.path().join(NAME), "").expect("written");
        assert!(!is_saving(&held));
        drop(taken(&held));
        assert!(!directory.path().join(NAME).exists());
    }

    #[test]
    fn a_lock_on_a_file_that_was_removed_is_none() {
        let (directory, held) = directory();
        let first = taken(&held);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| SaveLock::take(&held, Instant::now(), None));
            std::thread::sleep(Duration::from_millis(100));
            drop(first);
            let second = waiting.join().expect("no panic").expect("free").expect("waited for");
            assert!(
                is_there(&held, &second.file).expect("looked at") && directory.path().join(NAME).exists()
            );
            assert_eq!(take(&held).expect_err("held").kind(), io::ErrorKind::WouldBlock);
        });
    }

    #[test]
    fn nobody_but_writers_of_the_directory_can_open_it() {
        let (directory, held) = directory();
        for (of_directory, of_file) in
            [(0o755, 0o600), (0o700, 0o600), (0o775, 0o660), (0o1777, 0o666), (0o757, 0o606)]
        {
            fs::set_permissions(directory.path(), Permissions::from_mode(of_directory)).expect("set");
            let lock = taken(&held);
            assert_eq!(lock.file.metadata().expect("told").mode() & 0o7777, of_file, "{of_directory:o}");
        }
    }

    #[test]
    fn no_link_is_followed() {
        let (directory, held) = directory();
        symlink("elsewhere", directory.path().join(NAME)).expect("linked");
        assert_eq!(take(&held).expect_err("a link").raw_os_error(), Some(libc::ELOOP));
        assert!(!directory.path().join("elsewhere").exists());
    }

    #[test]
    fn an_error_says_what_was_waited_for() {
        let error = |number| refused(Path::new("a/b"), io::Error::from_raw_os_error(number));
        let held = error(libc::EWOULDBLOCK);
        assert_eq!((held.kind(), held.os_error()), (ErrorKind::Io, Some(libc::EWOULDBLOCK)));
        let text = held.to_string();
        assert!(text.contains("cannot lock the directory a/b") && text.contains("for 60 seconds"), "{text}");
        assert!(error(libc::EACCES).to_string().contains("a/b/.safetensors.lock is another user's"));
        assert!(!error(libc::EIO).to_string().contains("another"));
    }

    #[test]
    fn only_what_says_so_has_no_locks() {
        let says = |number| has_no_locks(&io::Error::from_raw_os_error(number));
        let lacking = [libc::ENOLCK, libc::EOPNOTSUPP, libc::EINVAL, libc::EBADF, libc::ENOSYS, libc::EPERM];
        assert!(lacking.map(says) == [true; 6]);
        assert!([libc::EIO, libc::EACCES, libc::EWOULDBLOCK, libc::EINTR].map(says) == [false; 4]);
    }
}
