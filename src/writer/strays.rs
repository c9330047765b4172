//! Removes what saves that were killed have left in a folder: staged files that belong to nobody any more.
//!
//! A staged file with a name is locked (`flock`) for as long as it is one, and the kernel gives the lock back however its
//! process ends. So a file whose lock can be taken has no owner, be it in another container. As some filesystems keep
//! locks to one machine, and one that shares the folder could be at work, nothing is removed either that was touched
//! within a day, by the clock of the filesystem. Where there are no locks at all, nothing is removed.

use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

/// What the names of staged files begin with, ahead of process and number, and how they end.
pub(super) const PREFIX: &str = ".safetensors-";
pub(super) const SUFFIX: &str = ".tmp";

/// As long as a file has to have been left alone, in seconds.
const ABANDONED_AFTER: i64 = 24 * 60 * 60;

/// How often a process looks through a folder, in seconds: a save should not read a folder of many names each time.
const INTERVAL: i64 = 60 * 60;

/// More folders than this are not remembered.
const MAX_FOLDERS: usize = 1000;

/// When folders were looked through last.
static LOOKED: LazyLock<Mutex<HashMap<PathBuf, i64>>> = LazyLock::new(Mutex::default);

/// Has others see that `file`, which has a name or will get one, belongs to this process.
pub(super) fn claim(file: &File) {
    // Without locks on its filesystem nobody can take it for a stray.
    flock(file, libc::LOCK_EX | libc::LOCK_NB);
}

/// Ends what [`claim`] began, for copies of the descriptor too that a fork has made.
pub(super) fn disclaim(file: &File) {
    flock(file, libc::LOCK_UN);
}

/// Whether the lock was changed.
fn flock(file: &File, operation: libc::c_int) -> bool {
    // SAFETY: a call without pointers on a descriptor that `file` keeps open.
    unsafe { libc::flock(file.as_raw_fd(), operation) == 0 }
}

/// Removes the strays in `folder`, where `staged` is a new file of this process, unless it has done so within the hour.
/// What cannot be looked at or removed stays.
pub(super) fn clear(folder: &Path, staged: &File) {
    let Ok(own) = staged.metadata() else { return };
    // Held by another thread, or by one that a fork has left behind: next time.
    let Ok(mut looked) = LOOKED.try_lock() else { return };
    if looked.get(folder).is_some_and(|&last| (last..last + INTERVAL).contains(&own.ctime())) {
        return;
    }
    if looked.len() >= MAX_FOLDERS {
        looked.clear();
    }
    looked.insert(folder.to_path_buf(), own.ctime());
    drop(looked);
    clear_at(folder, own.ctime(), own.uid());
}

/// The same at a time of the filesystem, for files of one user.
fn clear_at(folder: &Path, now: i64, uid: u32) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().and_then(owner).is_some_and(|process| !is_alive(process)) {
            remove_abandoned(&entry.path(), now, uid);
        }
    }
}

/// The process that a staged file's name speaks of; `None` for other names.
fn owner(name: &str) -> Option<libc::pid_t> {
    let (process, number) = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.split_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let process = process.parse().ok().filter(|_| is_number(process) && is_number(number))?;
    (process > 0).then_some(process)
}

/// Whether there is such a process on this machine, as far as this one can see.
fn is_alive(process: libc::pid_t) -> bool {
    // SAFETY: a call without pointers; signal 0 is not sent.
    let told = unsafe { libc::kill(process, 0) };
    told == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
}

fn remove_abandoned(path: &Path, now: i64, uid: u32) {
    let found = || path.symlink_metadata().ok().filter(|found| is_old(found, now, uid));
    let Some(before) = found() else { return };
    let open = |write| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
    };
    // NFS locks only what is open for writing; other filesystems also a file that may only be read.
    let Ok(file) = open(true).or_else(|_| open(false)) else { return };
    if !flock(&file, libc::LOCK_EX | libc::LOCK_NB) {
        return;
    }
    // The name may have gone to another file meanwhile. From here on it cannot, as who removes it needs the lock.
    let same = |other: &Metadata| (other.dev(), other.ino()) == (before.dev(), before.ino());
    if file.metadata().is_ok_and(|opened| same(&opened)) && found().is_some_and(|again| same(&again)) {
        // There is nobody to tell, and a save that can do without is not to fail for it.
        let _ = std::fs::remove_file(path);
    }
}

fn is_old(found: &Metadata, now: i64, uid: u32) -> bool {
    found.is_file() && found.uid() == uid && found.ctime() <= now.saturating_sub(ABANDONED_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// The number of a process that has ended.
    fn gone() -> u32 {
        let mut child = std::process::Command::new("true").spawn().expect("started");
        child.wait().expect("ended");
        child.id()
    }

    #[test]
    fn only_what_nobody_has_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: String| folder.path().join(name);
        let (gone, alive) = (gone(), std::os::unix::process::parent_id());
        let stray = at(format!(".safetensors-{gone}-0.tmp"));
        let read_only = at(format!(".safetensors-{gone}-1.tmp"));
        let locked = at(format!(".safetensors-{gone}-2.tmp"));
        let others = [
            at(format!(".safetensors-{alive}-0.tmp")),
            at(format!(".safetensors-{}-0.tmp", std::process::id())),
            at(format!(".safetensors-{gone}-0.whole")),
            at(format!(".safetensors-{gone}-0.old")),
            at(format!(".safetensors-{gone}.tmp")),
            at(format!(".safetensors-+{gone}-0.tmp")),
            at(format!(".safetensors-{gone}-x.tmp")),
            at(format!("safetensors-{gone}-0.tmp")),
            at(".safetensors-0-0.tmp".into()),
            at("model.safetensors".into()),
        ];
        for path in others.iter().chain([&stray, &read_only, &locked]) {
            fs::write(path, "bytes").expect("written");
        }
        let mut permissions = fs::metadata(&read_only).expect("there").permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&read_only, permissions).expect("changed");
        let owner = File::open(&locked).expect("there");
        claim(&owner);
        let link = at(format!(".safetensors-{gone}-3.tmp"));
        symlink(&others[9], &link).expect("linked");
        let inner = at(format!(".safetensors-{gone}-4.tmp"));
        fs::create_dir(&inner).expect("made");

        let own = fs::metadata(&stray).expect("there");
        let now = own.ctime();
        clear_at(folder.path(), now + ABANDONED_AFTER - 1, own.uid());
        clear_at(folder.path(), now + ABANDONED_AFTER + 1, own.uid() + 1);
        assert!(stray.exists(), "too young, or another's");
        clear_at(folder.path(), now + ABANDONED_AFTER + 1, own.uid());
        assert!(!stray.exists() && !read_only.exists());
        assert!(locked.exists() && link.is_symlink() && inner.is_dir());
        assert!(others.iter().all(|path| path.exists()));

        disclaim(&owner);
        clear_at(folder.path(), now + ABANDONED_AFTER + 1, own.uid());
        assert!(!locked.exists());
    }

    #[test]
    fn a_folder_is_looked_through_once_an_hour() {
        let folder = tempfile::tempdir().expect("a folder");
        let staged = tempfile::tempfile_in(folder.path()).expect("a file");
        let last = || LOOKED.lock().expect("no panic").get(folder.path()).copied();
        while last().is_none() {
            clear(folder.path(), &staged);
        }
        let now = last().expect("looked");
        LOOKED.lock().expect("no panic").insert(folder.path().into(), now - INTERVAL + 60);
        clear(folder.path(), &staged);
        assert_eq!(last(), Some(now - INTERVAL + 60));
        LOOKED.lock().expect("no panic").insert(folder.path().into(), now - INTERVAL);
        while last() != Some(now) {
            clear(folder.path(), &staged);
        }
    }
}
