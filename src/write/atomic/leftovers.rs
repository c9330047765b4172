//! Removes what saves that were killed have left in a directory: staged files that belong to nobody any more.
//!
//! A staged file with a name is locked (`File::lock`) for as long as it is one, and the kernel gives the lock back however
//! its process ends. So a file whose lock can be taken has no owner, be it in another container. It must have been left
//! alone for an hour all the same, by the clock of the filesystem, as a machine that has the directory through this one
//! (an export, a shared directory) may keep its locks to itself. On filesystems that machines share it must be a day, and
//! its process be gone. Where there are no locks at all, nothing is removed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

use crate::sys::directory::{Directory, identity};
use crate::sys::filesystem::is_local;

/// What the names of staged files begin with, ahead of process and number, and how they end.
pub(crate) const PREFIX: &str = ".safetensors-";
pub(crate) const SUFFIX: &str = ".tmp";

/// When a staged file whose lock can be taken is a stray.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rule {
    /// As long as it has to have been left alone, in seconds.
    abandoned_after: i64,
    /// Whether the process that its name speaks of must be gone too.
    process_is_gone: bool,
    /// How often a process looks through a directory, in seconds: a save should not read a directory of many names each time.
    interval: i64,
}

/// Where the processes of one machine have the file, in containers perhaps, which all begin with the same numbers.
const LOCAL: Rule = Rule { abandoned_after: 60 * 60, process_is_gone: false, interval: 60 };

const SHARED: Rule = Rule { abandoned_after: 24 * 60 * 60, process_is_gone: true, interval: 60 * 60 };

/// More directories than this are not remembered.
const MAX_DIRECTORYS: usize = 1000;

/// For how long directories are not looked through again: from when to when. Made by the compiler: what a thread makes at
/// its first use, a process that is forked in that moment waits for for ever.
static LOOKED: Mutex<BTreeMap<(u64, u64), Range<i64>>> = Mutex::new(BTreeMap::new());

/// Has others see that `file`, which has a name or will get one, belongs to this process.
pub(crate) fn claim(file: &File) {
    // Without locks on its filesystem nobody can take it for a stray.
    let _ = file.try_lock();
}

/// Ends what [`claim`] began, for copies of the descriptor too that a fork has made.
pub(crate) fn disclaim(file: &File) {
    // Where there are no locks there is none to give back.
    let _ = file.unlock();
}

/// Removes the strays in `directory`, where `staged` is a new file of this process, unless it has done so just now. What
/// cannot be looked at or removed stays.
pub(crate) fn clear(directory: &Directory, staged: &File) {
    let (Ok(own), Ok(number)) = (staged.metadata(), directory.identity()) else { return };
    // Guard by another thread, or by one that a fork has left behind: next time.
    let Ok(mut looked) = LOOKED.try_lock() else { return };
    if looked.get(&number).is_some_and(|quiet| quiet.contains(&own.ctime())) {
        return;
    }
    let rule = if is_local(staged) { LOCAL } else { SHARED };
    if looked.len() >= MAX_DIRECTORYS {
        looked.clear();
    }
    looked.insert(number, own.ctime()..own.ctime() + rule.interval);
    drop(looked);
    clear_at(directory, own.ctime(), own.uid(), rule);
}

/// The same at a time of the filesystem, for files of one user.
fn clear_at(directory: &Directory, now: i64, uid: u32, rule: Rule) {
    let Ok(names) = directory.names() else { return };
    for name in names {
        let Some(process) = name.to_str().and_then(owner) else { continue };
        if !(rule.process_is_gone && is_alive(process)) {
            remove_abandoned(directory, &name, now.saturating_sub(rule.abandoned_after), uid);
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

/// Removes a file of the user `uid` that nobody has and that was left alone since `since`.
fn remove_abandoned(directory: &Directory, name: &OsStr, since: i64, uid: u32) {
    let is_abandoned = |found: &Metadata| found.is_file() && found.uid() == uid && found.ctime() <= since;
    let found = || directory.open_entry(name).ok()??.metadata().ok().filter(is_abandoned);
    let Some(before) = found() else { return };
    let open = |access| directory.open_at(name, access | libc::O_NOFOLLOW | libc::O_NONBLOCK, 0);
    // NFS locks only what is open for writing; other filesystems also a file that may only be read.
    let Ok(file) = open(libc::O_RDWR).or_else(|_| open(libc::O_RDONLY)) else { return };
    if file.try_lock().is_err() {
        return;
    }
    // The name may have gone to another file meanwhile. From here on it cannot, as who removes it needs the lock.
    let same = |other: &Metadata| identity(other) == identity(&before);
    if file.metadata().is_ok_and(|opened| same(&opened)) && found().is_some_and(|again| same(&again)) {
        // There is nobody to tell, and a save that can do without is not to fail for it.
        let _ = directory.remove(name);
    }
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
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: String| directory.path().join(name);
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
        let held = Directory::open(directory.path()).expect("opened");
        let clear_after = |seconds, uid, rule| clear_at(&held, own.ctime() + seconds, uid, rule);
        clear_after(SHARED.abandoned_after - 60, own.uid(), SHARED);
        clear_after(LOCAL.abandoned_after - 60, own.uid(), LOCAL);
        clear_after(SHARED.abandoned_after + 60, own.uid() + 1, LOCAL);
        assert!(stray.exists(), "too young, or another's");
        clear_after(SHARED.abandoned_after + 60, own.uid(), SHARED);
        assert!(!stray.exists() && !read_only.exists());
        assert!(locked.exists() && link.is_symlink() && inner.is_dir());
        assert!(others.iter().all(|path| path.exists()));

        disclaim(&owner);
        clear_after(SHARED.abandoned_after + 60, own.uid(), SHARED);
        assert!(!locked.exists());

        // In a container every process may have the same number, from one start to the next.
        clear_after(LOCAL.abandoned_after + 60, own.uid(), LOCAL);
        let (of_a_number, rest) = others.split_at(2);
        assert!(of_a_number.iter().all(|path| !path.exists()));
        assert!(rest.iter().all(|path| path.exists()) && link.is_symlink() && inner.is_dir());
    }

    #[test]
    fn a_directory_is_not_looked_through_all_the_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let staged = tempfile::tempfile_in(directory.path()).expect("a file");
        let held = Directory::open(directory.path()).expect("opened");
        let number = held.identity().expect("told");
        let quiet = || LOOKED.lock().expect("no panic").get(&number).cloned();
        while quiet().is_none() {
            clear(&held, &staged);
        }
        let first = quiet().expect("looked");
        assert_eq!(first.end - first.start, if is_local(&staged) { LOCAL.interval } else { SHARED.interval });
        let mut earlier = first.start - 1..first.start + 1;
        LOOKED.lock().expect("no panic").insert(number, earlier.clone());
        clear(&held, &staged);
        assert_eq!(quiet(), Some(earlier));
        earlier = first.start - 1..first.start;
        LOOKED.lock().expect("no panic").insert(number, earlier);
        while quiet().as_ref() != Some(&first) {
            clear(&held, &staged);
        }
    }
}
