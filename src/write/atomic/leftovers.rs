//! Removes leftovers from a directory: staged files of processes that were killed.
//!
//! A staged file with a name is locked (`File::lock`) until it is renamed, and the kernel releases the lock when its
//! process ends. So a file that can be locked has no owner, even in another container. It must still be unchanged for an
//! hour by the filesystem's clock, because a machine that mounts the directory through this one may not share its locks.
//! On filesystems that several machines mount it must be a day, and the process must have ended. Without support for
//! locks nothing is removed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

use crate::sys::directory::{Directory, identity};
use crate::sys::filesystem::is_local;

/// The names of staged files are this prefix, the process and a number, and this suffix.
pub(crate) const PREFIX: &str = ".safetensors-";
pub(crate) const SUFFIX: &str = ".tmp";

/// Returns whether `name` is that of a staged file.
pub(crate) fn is_staged_name(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(PREFIX.as_bytes()) && name.ends_with(SUFFIX.as_bytes())
}

/// When a staged file that can be locked is a leftover.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rule {
    /// How long it must be unchanged, in seconds.
    abandoned_after: i64,
    /// Whether the process in its name must have ended too.
    process_has_ended: bool,
    /// How often a process scans a directory, in seconds, so that not every save reads all its names.
    interval: i64,
}

/// On a local filesystem. Processes of several containers have the same numbers, so numbers say nothing.
const LOCAL: Rule = Rule { abandoned_after: 60 * 60, process_has_ended: false, interval: 60 };

/// On a filesystem that several machines may mount.
const SHARED: Rule = Rule { abandoned_after: 24 * 60 * 60, process_has_ended: true, interval: 60 * 60 };

const MAX_DIRECTORIES: usize = 1000;

/// The time during which a directory is not scanned again. Initialized at compile time: a lazy initializer that is
/// running at a fork would never end in the child.
static SCANNED: Mutex<BTreeMap<(u64, u64), Range<i64>>> = Mutex::new(BTreeMap::new());

/// Marks `file`, which has a hidden name or will get one, as owned by a living process.
pub(crate) fn lock(file: &File) {
    // On a filesystem without locks no save removes it.
    let _ = file.try_lock();
}

/// Releases the lock of [`lock`], also for copies of the descriptor in forked processes.
pub(crate) fn unlock(file: &File) {
    // Fails on a filesystem without locks, which has none to release.
    let _ = file.unlock();
}

/// Removes the leftovers in `directory`, unless this process has done so recently. `staged` is a new file there. Ignores
/// errors.
pub(crate) fn remove_leftovers(directory: &Directory, staged: &File) {
    let (Ok(own), Ok(number)) = (staged.metadata(), directory.identity()) else { return };
    // If another thread has the lock, or had it at a fork, the next save scans.
    let Ok(mut scanned) = SCANNED.try_lock() else { return };
    if scanned.get(&number).is_some_and(|pause| pause.contains(&own.ctime())) {
        return;
    }
    let rule = if is_local(staged) { LOCAL } else { SHARED };
    if scanned.len() >= MAX_DIRECTORIES {
        scanned.clear();
    }
    scanned.insert(number, own.ctime()..own.ctime() + rule.interval);
    drop(scanned);
    remove_leftovers_at(directory, own.ctime(), own.uid(), rule);
}

/// Removes the leftovers of the user `uid`, at the time `now` of the filesystem.
fn remove_leftovers_at(directory: &Directory, now: i64, uid: u32, rule: Rule) {
    let Ok(names) = directory.names() else { return };
    for name in names {
        let Some(process) = name.to_str().and_then(owner) else { continue };
        if !(rule.process_has_ended && is_alive(process)) {
            remove_abandoned(directory, &name, now.saturating_sub(rule.abandoned_after), uid);
        }
    }
}

/// Returns the process in the name of a staged file; `None` for other names.
fn owner(name: &str) -> Option<libc::pid_t> {
    let (process, number) = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.split_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let process = process.parse().ok().filter(|_| is_number(process) && is_number(number))?;
    (process > 0).then_some(process)
}

/// Whether this process can see such a process.
fn is_alive(process: libc::pid_t) -> bool {
    // SAFETY: `kill` takes no pointer, and with signal 0 only checks that the process exists.
    let status = unsafe { libc::kill(process, 0) };
    status == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
}

/// Removes a file of the user `uid` that nobody has locked and that is unchanged since `since`.
fn remove_abandoned(directory: &Directory, name: &OsStr, since: i64, uid: u32) {
    let is_abandoned = |found: &Metadata| found.is_file() && found.uid() == uid && found.ctime() <= since;
    let found = || directory.open_entry(name).ok()??.metadata().ok().filter(is_abandoned);
    let Some(before) = found() else { return };
    let open = |access| directory.open_at(name, access | libc::O_NOFOLLOW | libc::O_NONBLOCK, 0);
    // NFS locks only files that are open for writing; other filesystems also read-only files.
    let Ok(file) = open(libc::O_RDWR).or_else(|_| open(libc::O_RDONLY)) else { return };
    if file.try_lock().is_err() {
        return;
    }
    // Another file may have the name by now. From here on none can get it, because a removal needs the lock.
    let same = |other: &Metadata| identity(other) == identity(&before);
    if file.metadata().is_ok_and(|opened| same(&opened)) && found().is_some_and(|again| same(&again)) {
        // A failure is no reason for the save to fail.
        let _ = directory.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Returns the number of a process that has ended.
    fn ended() -> u32 {
        let mut child = std::process::Command::new("true").spawn().expect("started");
        child.wait().expect("ended");
        child.id()
    }

    #[test]
    fn only_files_without_an_owner_are_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: String| directory.path().join(name);
        let (gone, alive) = (ended(), std::os::unix::process::parent_id());
        let leftover = at(format!(".safetensors-{gone}-0.tmp"));
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
        for path in others.iter().chain([&leftover, &read_only, &locked]) {
            fs::write(path, "bytes").expect("written");
        }
        let mut permissions = fs::metadata(&read_only).expect("there").permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&read_only, permissions).expect("changed");
        let owner = File::open(&locked).expect("there");
        lock(&owner);
        let link = at(format!(".safetensors-{gone}-3.tmp"));
        symlink(&others[9], &link).expect("linked");
        let inner = at(format!(".safetensors-{gone}-4.tmp"));
        fs::create_dir(&inner).expect("made");

        let own = fs::metadata(&leftover).expect("there");
        let opened = Directory::open(directory.path()).expect("opened");
        let remove_after =
            |seconds, uid, rule| remove_leftovers_at(&opened, own.ctime() + seconds, uid, rule);
        remove_after(SHARED.abandoned_after - 60, own.uid(), SHARED);
        remove_after(LOCAL.abandoned_after - 60, own.uid(), LOCAL);
        remove_after(SHARED.abandoned_after + 60, own.uid() + 1, LOCAL);
        assert!(leftover.exists(), "too young, or another user's");
        remove_after(SHARED.abandoned_after + 60, own.uid(), SHARED);
        assert!(!leftover.exists() && !read_only.exists());
        assert!(locked.exists() && link.is_symlink() && inner.is_dir());
        assert!(others.iter().all(|path| path.exists()));

        unlock(&owner);
        remove_after(SHARED.abandoned_after + 60, own.uid(), SHARED);
        assert!(!locked.exists());

        // In a container a process may have the same number after each start.
        remove_after(LOCAL.abandoned_after + 60, own.uid(), LOCAL);
        let (of_a_number, rest) = others.split_at(2);
        assert!(of_a_number.iter().all(|path| !path.exists()));
        assert!(rest.iter().all(|path| path.exists()) && link.is_symlink() && inner.is_dir());
    }

    #[test]
    fn a_directory_is_not_scanned_all_the_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let staged = tempfile::tempfile_in(directory.path()).expect("a file");
        let opened = Directory::open(directory.path()).expect("opened");
        let number = opened.identity().expect("told");
        let pause = || SCANNED.lock().expect("no panic").get(&number).cloned();
        // A directory that another test has removed may have had this number.
        SCANNED.lock().expect("no panic").remove(&number);
        while pause().is_none() {
            remove_leftovers(&opened, &staged);
        }
        let first = pause().expect("looked");
        assert_eq!(first.end - first.start, if is_local(&staged) { LOCAL.interval } else { SHARED.interval });
        let mut earlier = first.start - 1..first.start + 1;
        SCANNED.lock().expect("no panic").insert(number, earlier.clone());
        remove_leftovers(&opened, &staged);
        assert_eq!(pause(), Some(earlier));
        earlier = first.start - 1..first.start;
        SCANNED.lock().expect("no panic").insert(number, earlier);
        while pause().as_ref() != Some(&first) {
            remove_leftovers(&opened, &staged);
        }
    }
}
