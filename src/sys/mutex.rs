//! A mutex that cannot be poisoned, with a guard that can wait for a condition variable, and a value that is made once.
//!
//! The data must be consistent whenever the lock is released, also by a panic. Under ThreadSanitizer (`--cfg tsan`, see
//! `tests/rust/tsan.sh`) both announce their synchronization, because the standard library is not instrumented.

use std::ops::{Deref, DerefMut};
use std::sync::{self, Condvar, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug, Default)]
pub struct Mutex<T> {
    data: sync::Mutex<T>,
}

/// Access to the data; releases the lock on drop.
#[derive(Debug)]
pub struct Guard<'a, T> {
    mutex: &'a Mutex<T>,
    /// `None` only during a wait.
    guard: Option<MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub const fn new(data: T) -> Mutex<T> {
        Mutex { data: sync::Mutex::new(data) }
    }

    pub fn lock(&self) -> Guard<'_, T> {
        let guard = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        sanitizer::acquired(self);
        Guard { mutex: self, guard: Some(guard) }
    }
}

impl<T> Guard<'_, T> {
    /// Releases the lock until `change` is notified; may also return spuriously.
    pub fn wait(&mut self, change: &Condvar) {
        self.release_while(|guard| change.wait(guard).unwrap_or_else(PoisonError::into_inner));
    }

    /// As [`Guard::wait`], for at most `timeout`.
    pub fn wait_for(&mut self, change: &Condvar, timeout: Duration) {
        self.release_while(|guard| {
            change.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner).0
        });
    }
}

impl<'a, T> Guard<'a, T> {
    fn release_while(&mut self, wait: impl FnOnce(MutexGuard<'a, T>) -> MutexGuard<'a, T>) {
        if let Some(guard) = self.guard.take() {
            sanitizer::releases(self.mutex);
            self.guard = Some(wait(guard));
            sanitizer::acquired(self.mutex);
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.guard.as_deref().expect("a wait borrows the guard")
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.guard.as_deref_mut().expect("a wait borrows the guard")
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        sanitizer::releases(self.mutex);
    }
}

/// A value that the first thread that needs it makes.
#[derive(Debug)]
pub struct OnceLock<T> {
    value: sync::OnceLock<T>,
    /// Locked for every access under the sanitizer, which does not see how `value` orders its readers.
    #[cfg(tsan)]
    access: Mutex<()>,
}

impl<T> OnceLock<T> {
    pub const fn new() -> OnceLock<T> {
        OnceLock {
            value: sync::OnceLock::new(),
            #[cfg(tsan)]
            access: Mutex::new(()),
        }
    }

    pub fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        #[cfg(tsan)]
        let _access = self.access.lock();
        self.value.get_or_init(make)
    }
}

#[cfg(not(tsan))]
mod sanitizer {
    pub fn acquired<T>(_: &T) {}
    pub fn releases<T>(_: &T) {}
}

#[cfg(tsan)]
mod sanitizer {
    use std::ffi::c_void;

    unsafe extern "C" {
        fn __tsan_acquire(address: *mut c_void);
        fn __tsan_release(address: *mut c_void);
    }

    /// Orders this thread after the last release of the lock.
    pub fn acquired<T>(lock: &T) {
        // SAFETY: the sanitizer uses the address as a key and does not access it.
        unsafe { __tsan_acquire((&raw const *lock).cast_mut().cast()) }
    }

    pub fn releases<T>(lock: &T) {
        // SAFETY: as above.
        unsafe { __tsan_release((&raw const *lock).cast_mut().cast()) }
    }
}
