//! Data that several threads share under one lock, and wait for changes of.
//!
//! A [`Mutex`] that nobody can poison: what is in it must be whole whenever the lock is let go, also by a panic. Under
//! ThreadSanitizer (`--cfg tsan`, see `tests/rust/tsan.sh`) it says when it is taken and let go, as the standard library
//! that comes with the compiler is not instrumented and does so in secret.

use std::ops::{Deref, DerefMut};
use std::sync::{self, Condvar, MutexGuard, PoisonError};
use std::time::Duration;

/// The data and its lock.
#[derive(Debug)]
pub struct Mutex<T> {
    data: sync::Mutex<T>,
}

/// The lock is held until this is dropped.
#[derive(Debug)]
pub struct Guard<'a, T> {
    monitor: &'a Mutex<T>,
    /// None only while waiting.
    guard: Option<MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    /// Data that nobody has locked.
    pub fn new(data: T) -> Mutex<T> {
        Mutex { data: sync::Mutex::new(data) }
    }

    /// Waits for the lock.
    pub fn lock(&self) -> Guard<'_, T> {
        let guard = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        sanitizer::acquired(self);
        Guard { monitor: self, guard: Some(guard) }
    }
}

impl<T> Guard<'_, T> {
    /// Lets go of the lock until `change` is notified, or for no reason at all.
    pub fn wait(&mut self, change: &Condvar) {
        self.release_while(|guard| change.wait(guard).unwrap_or_else(PoisonError::into_inner));
    }

    /// As [`Guard::wait`], for no longer than `timeout`.
    pub fn wait_for(&mut self, change: &Condvar, timeout: Duration) {
        self.release_while(|guard| {
            change.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner).0
        });
    }
}

impl<'a, T> Guard<'a, T> {
    fn release_while(&mut self, wait: impl FnOnce(MutexGuard<'a, T>) -> MutexGuard<'a, T>) {
        if let Some(guard) = self.guard.take() {
            sanitizer::releases(self.monitor);
            self.guard = Some(wait(guard));
            sanitizer::acquired(self.monitor);
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.guard.as_deref().expect("nobody has this while it waits")
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.guard.as_deref_mut().expect("nobody has this while it waits")
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        sanitizer::releases(self.monitor);
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

    /// Everything before the last release of the same lock is before this.
    pub fn acquired<T>(lock: &T) {
        // SAFETY: the sanitizer takes the address for a name and does not look there.
        unsafe { __tsan_acquire((&raw const *lock).cast_mut().cast()) }
    }

    pub fn releases<T>(lock: &T) {
        // SAFETY: as above.
        unsafe { __tsan_release((&raw const *lock).cast_mut().cast()) }
    }
}
