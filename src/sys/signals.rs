//! Keeps the signals of failed writes from ending the process: the error of the write says the same.
//!
//! The kernel sends SIGPIPE to a thread that writes to a pipe without a reader, and SIGXFSZ to one that writes beyond the
//! process's limit of a file's size. Both end a process that has not said otherwise. What a signal does belongs to the
//! whole process and is the program's to choose, so they are blocked in the writing thread, for as long as it writes.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;

/// Calls `write` while SIGPIPE and SIGXFSZ are blocked in this thread, and discards those that it has caused.
pub(crate) fn block_write_signals<T>(write: impl FnOnce() -> T) -> T {
    let _blocked = Blocked::new();
    write()
}

/// The two signals are blocked in this thread until this is dropped, on the same thread.
struct Blocked {
    before: libc::sigset_t,
    /// Those of the two that were not pending before.
    ours: libc::sigset_t,
    /// A raw pointer keeps this from another thread, which has a mask of its own.
    _thread: PhantomData<*const ()>,
}

impl Blocked {
    fn new() -> Blocked {
        let mut ours = set_of(&[libc::SIGPIPE, libc::SIGXFSZ]);
        let mut before = set_of(&[]);
        // SAFETY: two sets that set_of() has initialized; the call fails only for an operation that is none.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const ours, &raw mut before) };
        for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
            // SAFETY: the sets are initialized, and the signals have valid numbers.
            unsafe {
                // A signal that was not blocked has been delivered: it cannot have been pending.
                if libc::sigismember(&raw const before, signal) == 1 && is_pending(signal) {
                    libc::sigdelset(&raw mut ours, signal);
                }
            }
        }
        Blocked { before, ours, _thread: PhantomData }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the sets are initialized, the information about the signal is not asked for, and the time is valid. The
        // type stays on its thread, whose mask this is.
        unsafe {
            // Both may be pending.
            while libc::sigtimedwait(&raw const self.ours, ptr::null_mut(), &raw const now) > 0 {}
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut());
        }
    }
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set; the signals have valid numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

fn is_pending(signal: libc::c_int) -> bool {
    let mut pending = set_of(&[]);
    // SAFETY: the set is initialized, and the signal has a valid number.
    unsafe { libc::sigpending(&raw mut pending) == 0 && libc::sigismember(&raw const pending, signal) == 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blocked(signal: libc::c_int) -> bool {
        let mut mask = set_of(&[]);
        // SAFETY: the set is initialized; without a new mask the old one is only looked at.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), &raw mut mask);
            libc::sigismember(&raw const mask, signal) == 1
        }
    }

    #[test]
    fn signals_of_the_write_are_discarded_and_the_mask_comes_back() {
        let value = block_write_signals(|| {
            assert!(is_blocked(libc::SIGPIPE) && is_blocked(libc::SIGXFSZ) && !is_blocked(libc::SIGTERM));
            // SAFETY: both are blocked in this thread, which is the one that raise() sends them to.
            let raised = unsafe { libc::raise(libc::SIGXFSZ) + libc::raise(libc::SIGPIPE) };
            assert_eq!(raised, 0);
            7
        });
        assert_eq!(value, 7);
        assert!(!is_blocked(libc::SIGPIPE) && !is_blocked(libc::SIGXFSZ) && !is_pending(libc::SIGXFSZ));
    }

    #[test]
    fn what_was_pending_stays() {
        let xfsz = set_of(&[libc::SIGXFSZ]);
        // SAFETY: an initialized set; the signal is blocked before it is raised.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const xfsz, ptr::null_mut());
            libc::raise(libc::SIGXFSZ);
        }
        block_write_signals(|| ());
        assert!(is_pending(libc::SIGXFSZ) && is_blocked(libc::SIGXFSZ));
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: an initialized set and a valid time. The signal is no longer pending when it is let through again.
        unsafe {
            libc::sigtimedwait(&raw const xfsz, ptr::null_mut(), &raw const now);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const xfsz, ptr::null_mut());
        }
    }

    #[test]
    fn a_panic_brings_the_mask_back() {
        let caught = std::panic::catch_unwind(|| block_write_signals(|| panic!("in the write")));
        assert!(caught.is_err() && !is_blocked(libc::SIGPIPE));
    }
}
