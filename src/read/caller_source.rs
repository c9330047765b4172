//! Sources of C programs, and of other languages: the struct of `include/safetensors_torch.h`.

// The names and the documentation are those of the header.
#![allow(missing_docs, non_camel_case_types)]

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::read::external::{ByteSource, Destination, Piece};

/// 0 for success, or the number of an [`ErrorKind`].
pub(crate) type Status = i32;

pub type sft_source_get_length = Option<
    unsafe extern "C" fn(context: *mut c_void, length: *mut u64, error: *mut sft_source_error) -> Status,
>;

pub type sft_source_get_identity = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        identity: *mut *const c_char,
        error: *mut sft_source_error,
    ) -> Status,
>;

pub type sft_source_get_max_requests = Option<unsafe extern "C" fn(context: *mut c_void) -> u32>;

pub type sft_source_read = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        offset: u64,
        buffers: *const sft_buffer,
        count: usize,
        error: *mut sft_source_error,
    ) -> Status,
>;

pub type sft_source_free = Option<unsafe extern "C" fn(context: *mut c_void)>;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_source {
    pub struct_size: usize,
    pub context: *mut c_void,
    pub get_length: sft_source_get_length,
    pub get_identity: sft_source_get_identity,
    pub read: sft_source_read,
    pub free: sft_source_free,
    pub get_max_requests: sft_source_get_max_requests,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_buffer {
    pub data: *mut c_void,
    pub nbytes: usize,
}

// The core's pieces are passed as they are.
const _: () = assert!(
    size_of::<sft_buffer>() == size_of::<Piece>()
        && std::mem::offset_of!(sft_buffer, nbytes) == std::mem::offset_of!(Piece, length)
);

/// What a function of a source says about its failure.
#[derive(Default)]
pub struct sft_source_error {
    os_error: i32,
    message: Option<String>,
}

impl sft_source_error {
    pub(crate) fn set(&mut self, os_error: i32, message: String) {
        (self.os_error, self.message) = (os_error, Some(message));
    }
}

/// `sft_source_error_set` without its checks, for functions of a source in Python: the address of that one would be looked up
/// by the dynamic linker, which could find another library's.
///
/// # Safety
///
/// `error` must be the one that the library has passed to the calling function, and `message` must end in NUL.
#[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only Python asks for it"))]
pub(crate) unsafe extern "C" fn set_error(
    error: *mut sft_source_error,
    os_error: i32,
    message: *const c_char,
) {
    // SAFETY: the error is valid, and this call has it alone; the message ends in NUL (this function's contract).
    let (error, message) = unsafe { (&mut *error, CStr::from_ptr(message)) };
    error.set(os_error, message.to_string_lossy().into_owned());
}

/// A source whose functions the caller has given. Drops its context.
#[derive(Debug)]
pub(crate) struct CallerSource(sft_source, Lifetime);

/// How long the functions of a source can be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lifetime {
    /// Until the process ends.
    Process,
    /// Until [`end_interpreter`]: an interpreter runs them, which ends earlier.
    Interpreter,
}

/// What functions of an interpreter return for success. If an exception, such as that of Ctrl-C, ends one before its first
/// statement, the interpreter returns another number, and there is no message.
const INTERPRETED: Status = 0x5AFE;

/// The number of calls that run in the interpreter, and whether it ends.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static HAS_ENDED: AtomicBool = AtomicBool::new(false);

/// Ends all calls of functions of an interpreter: later ones fail. Returns once those that run have returned, or after
/// `timeout`, because a forked process may count calls of threads that it does not have.
#[cfg_attr(not(feature = "bridge"), expect(dead_code, reason = "only Python has an interpreter"))]
pub(crate) fn end_interpreter(timeout: Duration) {
    let since = Instant::now();
    // Sequentially consistent, as in `Call::begin`: a call sees the end, or this sees the call.
    HAS_ENDED.store(true, Ordering::SeqCst);
    while CALLS.load(Ordering::SeqCst) > 0 && since.elapsed() < timeout {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A call that runs.
struct Call(Lifetime);

impl Call {
    /// Returns `None` if the interpreter has ended.
    fn begin(lifetime: Lifetime) -> Option<Call> {
        if lifetime == Lifetime::Process {
            return Some(Call(lifetime));
        }
        CALLS.fetch_add(1, Ordering::SeqCst);
        let call = Call(lifetime);
        (!HAS_ENDED.load(Ordering::SeqCst)).then_some(call)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.0 == Lifetime::Interpreter {
            CALLS.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

// SAFETY: several threads call the functions at once, and any of them frees the context (header, `sft_source`).
unsafe impl Send for CallerSource {}
// SAFETY: as above.
unsafe impl Sync for CallerSource {}

impl CallerSource {
    /// Takes a source over: its context is freed with the result, also if this fails.
    ///
    /// # Safety
    ///
    /// The functions keep the contract of the header (`sft_source`).
    pub(crate) unsafe fn new(source: sft_source, lifetime: Lifetime) -> Result<CallerSource> {
        let source = CallerSource(source, lifetime);
        if source.0.get_length.is_none() || source.0.read.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "sft_source: get_length and read must be set",
            ));
        }
        Ok(source)
    }

    fn call(&self, what: &str, function: impl FnOnce(*mut sft_source_error) -> Status) -> Result<()> {
        call(self.1, &format!("the source cannot {what}"), function)
    }
}

/// Calls a function of the caller, and turns its failure into an error; `what` is its text if the function sets none.
pub(crate) fn call(
    lifetime: Lifetime,
    what: &str,
    function: impl FnOnce(*mut sft_source_error) -> Status,
) -> Result<()> {
    let Some(_call) = Call::begin(lifetime) else {
        return Err(Error::new(ErrorKind::Closed, "the interpreter ends"));
    };
    let mut error = sft_source_error::default();
    let status = function(&raw mut error);
    match lifetime {
        Lifetime::Process if status == 0 => return Ok(()),
        Lifetime::Interpreter if status == INTERPRETED => return Ok(()),
        Lifetime::Interpreter if error.message.is_none() => {
            let interrupted = std::io::Error::from_raw_os_error(libc::EINTR);
            return Err(Error::new(ErrorKind::Io, "interrupted").with_os_error(interrupted));
        }
        _ => {}
    }
    let kind = match status {
        _ if status == ErrorKind::FileChanged as i32 => ErrorKind::FileChanged,
        _ if status == ErrorKind::InvalidArgument as i32 => ErrorKind::InvalidArgument,
        _ => ErrorKind::Io,
    };
    let failure = Error::new(kind, error.message.unwrap_or_else(|| what.to_owned()));
    Err(match error.os_error {
        0 => failure,
        os_error => failure.with_os_error(std::io::Error::from_raw_os_error(os_error)),
    })
}

impl ByteSource for CallerSource {
    fn length(&self) -> Result<u64> {
        let mut length = 0;
        let get_length = self.0.get_length.expect("checked by `new`");
        // SAFETY: the function keeps the contract of the header (`new`); both results are valid during the call.
        self.call("return its length", |error| unsafe {
            get_length(self.0.context, &raw mut length, error)
        })?;
        Ok(length)
    }

    fn identity(&self) -> Result<Option<String>> {
        let Some(get_identity) = self.0.get_identity else { return Ok(None) };
        let mut identity = std::ptr::null();
        // SAFETY: as in `length`.
        self.call("return its identity", |error| unsafe {
            get_identity(self.0.context, &raw mut identity, error)
        })?;
        if identity.is_null() {
            return Ok(None);
        }
        // SAFETY: a string that stays until the next call on this thread (header, `sft_source`).
        Ok(Some(unsafe { CStr::from_ptr(identity) }.to_string_lossy().into_owned()))
    }

    fn max_requests(&self) -> Option<usize> {
        let get_max_requests = self.0.get_max_requests?;
        let _call = Call::begin(self.1)?;
        // SAFETY: the function keeps the contract of the header (`new`).
        let most = unsafe { get_max_requests(self.0.context) };
        (most > 0).then_some(most as usize)
    }

    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<()> {
        let read = self.0.read.expect("checked by `new`");
        let pieces = destination.pieces();
        // SAFETY: the function keeps the contract of the header (`new`). A piece has the layout of an `sft_buffer` (checked
        // above), and is valid for writes during the call.
        self.call("read", |error| unsafe {
            read(self.0.context, offset, pieces.as_ptr().cast(), pieces.len(), error)
        })?;
        // SAFETY: the function has written all buffers if it succeeds (header, `sft_source`).
        unsafe { destination.set_written() };
        Ok(())
    }
}

impl Drop for CallerSource {
    fn drop(&mut self) {
        if let Some(free) = self.0.free
            && let Some(_call) = Call::begin(self.1)
        {
            // SAFETY: the function keeps the contract of the header (`new`), and nothing calls another one after it.
            unsafe { free(self.0.context) };
        }
    }
}
