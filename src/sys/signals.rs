//! Blocks SIGPIPE and SIGXFSZ during writes: by default they end the process, and the error of the write says the same.
//!
//! The kernel sends SIGPIPE for a pipe without a reader, and SIGXFSZ beyond the file size limit of the process. The program
//! chooses what a signal does in its whole process, so the signals are blocked only in the writing thread.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;

/// Calls `write` with SIGPIPE and SIGXFSZ blocked in this thread, and discards those that it caused.
pub(crate) fn block_write_signals<T>(write: impl FnOnce() -> T) -> T {
    let _blocked = Blocked::new();
    write()
}

/// Blocks the two signals in this thread until it is dropped.
struct Blocked {
    before: libc::sigset_t,
    /// Those of the two that were not pending before.
    caused: libc::sigset_t,
    /// Makes the type `!Send`: each thread has its own mask.
    _thread: PhantomData<*const ()>,
}

impl Blocked {
    fn new() -> Blocked {
        let mut caused = set_of(&[libc::SIGPIPE, libc::SIGXFSZ]);
        let mut before = set_of(&[]);
        // SAFETY: `set_of` has initialized both sets, and the operation is valid, so the call cannot fail.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const caused, &raw mut before) };
        for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
            // SAFETY: `set_of` has initialized the sets, and the signals have valid numbers.
            unsafe {
                // An unblocked signal is delivered at once, so it was not pending.
                if libc::sigismember(&raw const before, signal) == 1 && is_pending(signal) {
                    libc::sigdelset(&raw mut caused, signal);
                }
            }
        }
        Blocked { before, caused, _thread: PhantomData }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `Blocked::new` has initialized the sets, a null information pointer is allowed, and the time is valid. The
        // type is `!Send`, so `before` is the mask of this thread.
        unsafe {
            // Both may be pending.
            while libc::sigtimedwait(&raw const self.caused, ptr::null_mut(), &raw const now) > 0 {}
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut());
        }
    }
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set before it is used, and the callers pass valid signal numbers.
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
    // SAFETY: `set_of` has initialized the set, and the callers pass valid signal numbers.
    unsafe { libc::sigpending(&raw mut pending) == 0 && libc::sigismember(&raw const pending, signal) == 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blocked(signal: libc::c_int) -> bool {
        let mut mask = set_of(&[]);
        // SAFETY: `set_of` has initialized the set; with a null new mask the call only reads the old one.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), &raw mut mask);
            libc::sigismember(&raw const mask, signal) == 1
        }
    }

    #[test]
    fn signals_of_the_write_are_discarded_and_the_mask_is_restored() {
        let value = block_write_signals(|| {
            assert!(is_blocked(libc::SIGPIPE) && is_blocked(libc::SIGXFSZ) && !is_blocked(libc::SIGTERM));
            // SAFETY: both are blocked in this thread, to which raise() sends them.
            let raised = unsafe { libc::raise(libc::SIGXFSZ) + libc::raise(libc::SIGPIPE) };
            assert_eq!(raised, 0);
            7
        });
        assert_eq!(value, 7);
        assert!(!is_blocked(libc::SIGPIPE) && !is_blocked(libc::SIGXFSZ) && !is_pending(libc::SIGXFSZ));
    }

    #[test]
    fn earlier_pending_signals_stay() {
        let xfsz = set_of(&[libc::SIGXFSZ]);
        // SAFETY: the set is initialized, and the signal is blocked before it is raised.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const xfsz, ptr::null_mut());
            libc::raise(libc::SIGXFSZ);
        }
        block_write_signals(|| ());
        assert!(is_pending(libc::SIGXFSZ) && is_blocked(libc::SIGXFSZ));
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the set and the time are initialized. The signal is no longer pending when it is unblocked.
        unsafe {
            libc::sigtimedwait(&raw const xfsz, ptr::null_mut(), &raw const now);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const xfsz, ptr::null_mut());
        }
    }

    #[test]
    fn a_panic_restores_the_mask() {
        let caught = std::panic::catch_unwind(|| block_write_signals(|| panic!("in the write")));
        assert!(caught.is_err() && !is_blocked(libc::SIGPIPE));
    }
}
