//! The boundary of every C function: catches panics, and stores the calling thread's last error.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::types::{SFT_OK, sft_status};
use crate::error::{Error, ErrorKind, Result};

/// The body of a C function, which no panic leaves.
///
/// `boundary!({ ... })` takes a body that returns `Result<()>`, and returns the status; an error or a panic becomes the
/// thread's last error. `boundary!(fallback; { ... })` returns the body's value, or `fallback` after a panic.
macro_rules! boundary {
    ($body:block) => {
        $crate::capi::boundary::guard(|| $body)
    };
    ($fallback:expr; $body:block) => {
        $crate::capi::boundary::guard_value($fallback, || $body)
    };
}
pub(super) use boundary;

/// What the last failed call of a thread left behind.
#[derive(Default)]
struct LastError {
    message: CString,
    os_error: i32,
}

thread_local! {
    static LAST_ERROR: RefCell<LastError> = RefCell::new(LastError::default());
}

/// Runs `body`, stores its error for the thread, and returns the status.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> sft_status {
    // Unwind safety: a panic leaves nothing half done that a later call could see. Open files do not change, the lists
    // of a writer grow by whole entries, and a tensor whose write panicked does not count as written.
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(panic_error(payload)));
    match outcome {
        Ok(()) => SFT_OK,
        Err(error) => {
            store(&error);
            error.code()
        }
    }
}

/// Runs `body`, and returns its value, or `fallback` if it panics.
pub(super) fn guard_value<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        store(&panic_error(payload));
        fallback
    })
}

fn panic_error(payload: Box<dyn Any + Send>) -> Error {
    let message = match payload.downcast::<&str>() {
        Ok(text) => text.to_string(),
        Err(payload) => match payload.downcast::<String>() {
            Ok(text) => *text,
            Err(payload) => {
                // The destructor of another type may panic too, and nothing would catch that.
                std::mem::forget(payload);
                "the panic has no message".to_string()
            }
        },
    };
    Error::new(ErrorKind::Panic, format!("this is a bug of safetensors_torch, please report it: {message}"))
}

fn store(error: &Error) {
    let last = LastError {
        // The text has no NUL: it escapes control characters.
        message: CString::new(error.to_string()).unwrap_or_default(),
        os_error: error.os_error().unwrap_or(0),
    };
    // Fails in a thread that is ending: its thread-locals are gone.
    let _ = LAST_ERROR.try_with(|stored| stored.replace(last));
}

#[unsafe(no_mangle)]
pub extern "C" fn sft_last_error_get_message() -> *const c_char {
    boundary!(c"".as_ptr(); {
        LAST_ERROR.try_with(|stored| stored.borrow().message.as_ptr()).unwrap_or(c"".as_ptr())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn sft_last_error_get_os_error() -> i32 {
    boundary!(0; { LAST_ERROR.try_with(|stored| stored.borrow().os_error).unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last_message() -> String {
        // SAFETY: never NULL, and NUL-terminated until this thread's next failure.
        unsafe { CStr::from_ptr(sft_last_error_get_message()) }.to_str().expect("UTF-8").to_string()
    }

    /// A panic payload whose destructor panics.
    struct PanicsOnDrop;

    impl Drop for PanicsOnDrop {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[test]
    fn a_panic_becomes_a_status() {
        assert_eq!(boundary!({ panic!("number {}", 7) }), ErrorKind::Panic as i32);
        assert!(last_message().ends_with("please report it: number 7"), "{}", last_message());
        assert_eq!(boundary!({ panic!("plain") }), ErrorKind::Panic as i32);
        assert!(last_message().ends_with("plain"), "{}", last_message());
        assert_eq!(boundary!({ std::panic::panic_any(PanicsOnDrop) }), ErrorKind::Panic as i32);
        assert!(last_message().ends_with("no message"), "{}", last_message());
        assert_eq!(boundary!(5; { panic!("value") }), 5);
        assert!(last_message().ends_with("value"), "{}", last_message());
    }

    #[test]
    fn a_message_with_nul_keeps_its_end() {
        assert_eq!(boundary!({ Err(Error::new(ErrorKind::Slice, "a\0b")) }), ErrorKind::Slice as i32);
        assert_eq!(last_message(), "a\\0b");
    }

    #[test]
    fn success_leaves_the_last_error_alone() {
        assert_eq!(boundary!({ Err(Error::new(ErrorKind::Closed, "first")) }), ErrorKind::Closed as i32);
        assert_eq!(boundary!({ Ok(()) }), SFT_OK);
        assert_eq!(last_message(), "first");
        assert_eq!(sft_last_error_get_os_error(), 0);
    }
}
