//! Status numbers and the calling thread's last error; the one place where panics are caught.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::boundary;
use crate::error::{Error, ErrorKind, Result};

/// 0, or the number of an [`ErrorKind`].
pub type sft_status = i32;

/// The status of a call that did what it was asked for.
pub const SFT_OK: sft_status = 0;

/// What the last failed call of a thread left behind.
#[derive(Default)]
struct LastError {
    message: CString,
    os_error: i32,
}

thread_local! {
    static LAST_ERROR: RefCell<LastError> = RefCell::new(LastError::default());
}

/// Runs a body that may fail; gives its status, and keeps its error for the thread.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> sft_status {
    // A body that panicked leaves nothing half done that a later call could see: files do not change once they are
    // open, a writer's lists grow by whole entries, and what a stream was writing is not taken for written.
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(panic_error(payload)));
    match outcome {
        Ok(()) => SFT_OK,
        Err(error) => {
            remember(&error);
            error.code()
        }
    }
}

/// Runs a body that has no status to give; gives `fallback` where it panics.
pub(super) fn guard_value<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        remember(&panic_error(payload));
        fallback
    })
}

fn panic_error(payload: Box<dyn Any + Send>) -> Error {
    let said = match payload.downcast::<&str>() {
        Ok(text) => text.to_string(),
        Err(payload) => match payload.downcast::<String>() {
            Ok(text) => *text,
            Err(payload) => {
                // The destructor of another type may panic too, and nothing would catch that.
                std::mem::forget(payload);
                "it gave no text".to_string()
            }
        },
    };
    Error::new(ErrorKind::Panic, format!("this is a bug of safetensors_torch, please report it: {said}"))
}

fn remember(error: &Error) {
    // A name may hold NUL, which would end the text too early.
    let text = error.to_string().replace('\0', "\\0");
    let last = LastError {
        message: CString::new(text).unwrap_or_default(),
        os_error: error.os_error().unwrap_or(0),
    };
    // A thread that is ending may have no place for it any more.
    let _ = LAST_ERROR.try_with(|place| place.replace(last));
}

/// The message of the last call that failed on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn sft_last_error_get_message() -> *const c_char {
    boundary!(c"".as_ptr(); {
        LAST_ERROR.try_with(|place| place.borrow().message.as_ptr()).unwrap_or(c"".as_ptr())
    })
}

/// `errno` of the last call that failed on this thread, or 0.
#[unsafe(no_mangle)]
pub extern "C" fn sft_last_error_get_os_error() -> i32 {
    boundary!(0; { LAST_ERROR.try_with(|place| place.borrow().os_error).unwrap_or(0) })
}

macro_rules! statuses {
    ($( $kind:ident, $name:literal, $message:literal; )*) => {
        /// Every error: its number and its name in the header.
        pub const STATUS_NAMES: &[(sft_status, &str)] = &[ $( (ErrorKind::$kind as i32, $name), )* ];

        fn name_and_message(kind: ErrorKind) -> (*const c_char, *const c_char) {
            match kind {
                $( ErrorKind::$kind => (concat!($name, "\0").as_ptr().cast(), concat!($message, "\0").as_ptr().cast()), )*
            }
        }
    };
}

statuses! {
    InvalidArgument, "SFT_ERROR_INVALID_ARGUMENT", "an argument is not one that this function takes";
    Io, "SFT_ERROR_IO", "the operating system refused";
    FileTooSmall, "SFT_ERROR_FILE_TOO_SMALL", "the file is shorter than the length of a header";
    HeaderTooLarge, "SFT_ERROR_HEADER_TOO_LARGE", "the header is larger than the format allows";
    HeaderTruncated, "SFT_ERROR_HEADER_TRUNCATED", "the header runs past the end of the file";
    ForeignFormat, "SFT_ERROR_FOREIGN_FORMAT", "the file is of another format";
    HeaderUtf8, "SFT_ERROR_HEADER_UTF8", "the header is not UTF-8";
    HeaderJson, "SFT_ERROR_HEADER_JSON", "the header is not the JSON that the format asks for";
    Duplicate, "SFT_ERROR_DUPLICATE", "a name, a field or a metadata key stands twice";
    UnknownDtype, "SFT_ERROR_UNKNOWN_DTYPE", "the format knows no such dtype";
    ShapeOverflow, "SFT_ERROR_SHAPE_OVERFLOW", "the shape does not fit in 63 bits";
    SizeMismatch, "SFT_ERROR_SIZE_MISMATCH", "the data offsets do not fit dtype and shape";
    Offsets, "SFT_ERROR_OFFSETS", "the data offsets are reversed, overlap or leave a hole";
    DataLength, "SFT_ERROR_DATA_LENGTH", "the data is shorter or longer than its tensors";
    TensorNotFound, "SFT_ERROR_TENSOR_NOT_FOUND", "there is no tensor of that name";
    ReservedName, "SFT_ERROR_RESERVED_NAME", "the name is reserved for the metadata";
    UnsupportedDtype, "SFT_ERROR_UNSUPPORTED_DTYPE", "the dtype cannot be held";
    Slice, "SFT_ERROR_SLICE", "the slice does not fit the tensor";
    BufferSize, "SFT_ERROR_BUFFER_SIZE", "the buffer has the wrong size";
    Closed, "SFT_ERROR_CLOSED", "the file is closed";
    FileChanged, "SFT_ERROR_FILE_CHANGED", "the file was changed while it was open or edited";
    Panic, "SFT_ERROR_PANIC", "a bug of this library";
    Index, "SFT_ERROR_INDEX", "the index of the checkpoint does not fit its files";
}

fn kind_of(status: sft_status) -> Option<ErrorKind> {
    ErrorKind::ALL.iter().copied().find(|&kind| kind as i32 == status)
}

/// The name of a status in the header.
#[unsafe(no_mangle)]
pub extern "C" fn sft_status_get_name(status: sft_status) -> *const c_char {
    boundary!(c"".as_ptr(); {
        match kind_of(status) {
            Some(kind) => name_and_message(kind).0,
            None if status == SFT_OK => c"SFT_OK".as_ptr(),
            None => c"unknown status".as_ptr(),
        }
    })
}

/// What a status means, in a few words.
#[unsafe(no_mangle)]
pub extern "C" fn sft_status_get_message(status: sft_status) -> *const c_char {
    boundary!(c"".as_ptr(); {
        match kind_of(status) {
            Some(kind) => name_and_message(kind).1,
            None if status == SFT_OK => c"no error".as_ptr(),
            None => c"a status that this version of the library does not know".as_ptr(),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last_message() -> String {
        // SAFETY: never NULL, and NUL-terminated until this thread's next failure.
        unsafe { CStr::from_ptr(sft_last_error_get_message()) }.to_str().expect("UTF-8").to_string()
    }

    /// Dropping it while nothing panics is a panic itself.
    struct Spiteful;

    impl Drop for Spiteful {
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
        assert_eq!(boundary!({ std::panic::panic_any(Spiteful) }), ErrorKind::Panic as i32);
        assert!(last_message().ends_with("no text"), "{}", last_message());
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
