//! Every conversion between C pointers and Rust references.
//!
//! Checks what can be checked: NULL, alignment, length, UTF-8. The rest is a clause of the header (see the module above),
//! which the C caller keeps, and which each function here requires by name.

use std::cell::Cell;
use std::ffi::{CStr, OsStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::raw_bytes::RawBytes;

/// The largest size that a struct of this ABI may have; a larger one was never set.
const MAX_STRUCT_BYTES: usize = 4096;

pub(super) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, detail)
}

/// Compiles only if several threads may use a `T` at once.
pub(super) const fn assert_sync<T: Sync>() {}

/// Refuses NULL and misaligned pointers.
fn check<T>(pointer: *const T, what: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(invalid(format!("{what} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(invalid(format!("{what} is not aligned to {} bytes", align_of::<T>())));
    }
    Ok(())
}

/// As [`check`]; refuses arrays that no memory could hold, too.
fn check_array<T>(pointer: *const T, length: usize, what: &str) -> Result<()> {
    check(pointer, what)?;
    match length.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(invalid(format!("{what} has {length} elements, more than memory can hold"))),
    }
}

/// Moves `value` to the heap, and returns the handle that [`free_handle`] takes.
pub(super) fn new_handle<T>(value: T) -> *mut T {
    Box::into_raw(Box::new(value))
}

/// Frees a handle; NULL is ignored.
///
/// # Safety
///
/// "Ownership": `handle` is NULL, or came from [`new_handle`] and was not freed. "Threads": no other thread uses it.
pub(super) unsafe fn free_handle<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: a `Box` of this type made it ("Ownership"), and nobody refers to it ("Threads").
        drop(unsafe { Box::from_raw(handle) });
    }
}

/// Borrows a const handle.
///
/// # Safety
///
/// "Ownership": `handle` is NULL or a live handle. "Threads": nobody changes or frees it during the call.
pub(super) unsafe fn shared<'a, T>(handle: *const T, what: &str) -> Result<&'a T> {
    check(handle, what)?;
    // SAFETY: not NULL and aligned (checked above), a live `T` ("Ownership") that does not change ("Threads").
    Ok(unsafe { &*handle })
}

/// Borrows a handle to change it.
///
/// # Safety
///
/// "Ownership": `handle` is NULL or a live handle. "Threads": nobody else uses it during the call.
pub(super) unsafe fn exclusive<'a, T>(handle: *mut T, what: &str) -> Result<&'a mut T> {
    check(handle, what)?;
    // SAFETY: not NULL and aligned (checked above), a live `T` ("Ownership") that nobody else uses ("Threads").
    Ok(unsafe { &mut *handle })
}

/// Memory for one result, checked before any work is done. It may be uninitialized, and two results may share it.
pub(super) struct Out<'a, T>(&'a Cell<MaybeUninit<T>>);

impl<T> Out<'_, T> {
    /// # Safety
    ///
    /// "Pointers": `pointer` is NULL, or valid for reads and writes of a `T` during the call, and apart from what the
    /// call reads.
    pub(super) unsafe fn new(pointer: *mut T, what: &str) -> Result<Self> {
        check(pointer, what)?;
        // SAFETY: not NULL and aligned (checked above), valid during the call ("Pointers"). A `Cell` of `MaybeUninit` has
        // the layout of a `T`, need not be initialized, and may have aliases.
        Ok(Out(unsafe { &*pointer.cast::<Cell<MaybeUninit<T>>>() }))
    }

    pub(super) fn set(&self, value: T) {
        self.0.set(MaybeUninit::new(value));
    }
}

impl<T> Out<'_, *mut T> {
    /// As [`Out::new`], for a result that is NULL unless the call succeeds.
    ///
    /// # Safety
    ///
    /// As for [`Out::new`].
    pub(super) unsafe fn null(pointer: *mut *mut T, what: &str) -> Result<Self> {
        // SAFETY: this function has the contract of `Out::new`.
        let out = unsafe { Out::new(pointer, what) }?;
        out.set(std::ptr::null_mut());
        Ok(out)
    }
}

/// Borrows an array; NULL is allowed if it is empty.
///
/// # Safety
///
/// "Pointers": `pointer` is NULL or valid for reads of `length` elements, which nobody changes while the result is used.
pub(super) unsafe fn array<'a, T>(pointer: *const T, length: usize, what: &str) -> Result<&'a [T]> {
    if length == 0 {
        return Ok(&[]);
    }
    check_array(pointer, length, what)?;
    // SAFETY: not NULL, aligned, not too long (checked above); valid and unchanged ("Pointers").
    Ok(unsafe { std::slice::from_raw_parts(pointer, length) })
}

/// Borrows an array; NULL becomes `None`.
///
/// # Safety
///
/// As for [`array`].
pub(super) unsafe fn optional_array<'a, T>(
    pointer: *const T,
    length: usize,
    what: &str,
) -> Result<Option<&'a [T]>> {
    // SAFETY: this function has the contract of `array`.
    if pointer.is_null() { Ok(None) } else { unsafe { array(pointer, length, what) }.map(Some) }
}

/// Borrows an array of results, as [`Out`] does one; NULL is allowed if it is empty.
///
/// # Safety
///
/// "Pointers": as for [`Out::new`], for `length` elements.
pub(super) unsafe fn out_array<'a, T>(
    pointer: *mut T,
    length: usize,
    what: &str,
) -> Result<&'a [Cell<MaybeUninit<T>>]> {
    // SAFETY: the contract of `array`, with elements that may be uninitialized, have aliases and change.
    unsafe { array(pointer.cast::<Cell<MaybeUninit<T>>>(), length, what) }
}

/// Checks a buffer for results; NULL is allowed if it is empty.
///
/// Returns a pointer, because the buffer may be uninitialized and the values of a slice may not.
pub(super) fn buffer(pointer: *mut c_void, length: usize, what: &str) -> Result<*mut u8> {
    if length == 0 {
        return Ok(std::ptr::NonNull::dangling().as_ptr());
    }
    check_array(pointer.cast::<u8>(), length, what)?;
    Ok(pointer.cast())
}

/// Borrows bytes that others may change.
///
/// # Safety
///
/// "Pointers": `pointer` is NULL or valid for reads of `length` bytes while the result is used.
pub(super) unsafe fn bytes<'a>(pointer: *const c_void, length: usize, what: &str) -> Result<RawBytes<'a>> {
    let start = buffer(pointer.cast_mut(), length, what)?;
    // SAFETY: valid for reads (this function's contract; not NULL and not too long, checked).
    Ok(unsafe { RawBytes::new(start, length) })
}

/// Borrows UTF-8 text with a length, which may contain NUL.
///
/// # Safety
///
/// As for [`array`].
pub(super) unsafe fn text<'a>(pointer: *const c_char, length: usize, what: &str) -> Result<&'a str> {
    // SAFETY: this function has the contract of `array`; every value is a `u8`.
    let bytes = unsafe { array(pointer.cast::<u8>(), length, what) }?;
    std::str::from_utf8(bytes)
        .map_err(|error| invalid(format!("{what} is not UTF-8: bad byte at {}", error.valid_up_to())))
}

/// Borrows a string.
///
/// # Safety
///
/// "Text": `pointer` is NULL or points to bytes up to a NUL. "Pointers": nobody changes them while the result is used.
pub(super) unsafe fn c_string<'a>(pointer: *const c_char, what: &str) -> Result<&'a CStr> {
    check(pointer, what)?;
    // SAFETY: not NULL (checked above), ends in NUL ("Text"), valid and unchanged ("Pointers").
    Ok(unsafe { CStr::from_ptr(pointer) })
}

/// Borrows a UTF-8 string of the struct `name`; NULL becomes `None`.
///
/// # Safety
///
/// As for [`c_string`].
pub(super) unsafe fn optional_string<'a>(
    pointer: *const c_char,
    name: &str,
    field: &str,
) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: this function has the contract of `c_string`.
    let text = unsafe { c_string(pointer, field) }?;
    text.to_str().map(Some).map_err(|_| invalid(format!("{name}: {field} is not UTF-8")))
}

/// Borrows a path, in the bytes of the filesystem.
///
/// # Safety
///
/// As for [`c_string`].
pub(super) unsafe fn path<'a>(pointer: *const c_char) -> Result<&'a Path> {
    // SAFETY: this function has the contract of `c_string`.
    let bytes = unsafe { c_string(pointer, "path") }?.to_bytes();
    Ok(Path::new(OsStr::from_bytes(bytes)))
}

/// A struct that begins with its own size, `struct_size`, and grows at its end from version to version.
///
/// # Safety
///
/// The type is `repr(C)` without padding, its first field is that `usize`, and every bit pattern is a valid value.
pub(super) unsafe trait Versioned: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// Its size in the first version of the ABI.
    const FIRST_SIZE: usize;
}

/// Declares that a struct is [`Versioned`], and its size in the first version of the ABI.
macro_rules! versioned {
    (unsafe $name:ident, $first_size:literal) => {
        // SAFETY: whoever writes `unsafe` here has checked the contract of [`Versioned`] for this struct.
        unsafe impl $crate::capi::pointer::Versioned for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST_SIZE: usize = $first_size;
        }
    };
}
pub(super) use versioned;

/// Reads and checks `struct_size`.
///
/// # Safety
///
/// "Pointers": `pointer` is NULL or valid for a read of a `usize`.
unsafe fn struct_size<T: Versioned>(pointer: *const T) -> Result<usize> {
    check(pointer, T::NAME)?;
    // SAFETY: not NULL and aligned (checked above), valid ("Pointers"); the first field is a `usize` (`Versioned`).
    let size = unsafe { pointer.cast::<usize>().read() };
    if !(T::FIRST_SIZE..=MAX_STRUCT_BYTES).contains(&size) {
        return Err(invalid(format!(
            "{}: struct_size is {size}: set it to sizeof({0}), which is {} here",
            T::NAME,
            size_of::<T>()
        )));
    }
    Ok(size)
}

/// Reads options of this or another version of the header. Fields that the caller's version lacks are zero, the default of
/// every option, as are all fields if `pointer` is NULL; fields that this version lacks must be zero.
///
/// # Safety
///
/// "Pointers" and "Versions": `pointer` is NULL, or valid for reads of as many bytes as its `struct_size` says.
pub(super) unsafe fn options<T: Versioned>(pointer: *const T) -> Result<T> {
    // SAFETY: every bit pattern is a `T` (`Versioned`), zero too.
    let mut options = unsafe { std::mem::zeroed::<T>() };
    if pointer.is_null() {
        return Ok(options);
    }
    // SAFETY: valid for a read of its first field ("Pointers").
    let size = unsafe { struct_size(pointer) }?;
    let known = size.min(size_of::<T>());
    // SAFETY: not NULL (checked above), valid for `size` bytes ("Versions"), none of them padding (`Versioned`).
    let given = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), size) };
    if given[known..].iter().any(|&byte| byte != 0) {
        return Err(invalid(format!(
            "{}: sets a field that version {} of the library does not know",
            T::NAME,
            env!("CARGO_PKG_VERSION")
        )));
    }
    // SAFETY: both sides have `known` bytes (the minimum of their sizes), and every bit pattern is a `T` (`Versioned`).
    unsafe { std::ptr::copy_nonoverlapping(given.as_ptr(), (&raw mut options).cast::<u8>(), known) };
    Ok(options)
}

/// A struct for results, of this or another version of the header.
pub(super) struct VersionedOut<'a, T> {
    bytes: &'a [Cell<MaybeUninit<u8>>],
    version: std::marker::PhantomData<T>,
}

impl<T: Versioned> VersionedOut<'_, T> {
    /// # Safety
    ///
    /// "Pointers" and "Versions": `pointer` is NULL, or valid during the call for reads and writes of as many bytes as its
    /// `struct_size` says.
    pub(super) unsafe fn new(pointer: *mut T) -> Result<Self> {
        // SAFETY: valid for a read of its first field ("Pointers"), and then for `size` bytes ("Versions").
        let bytes = unsafe {
            let size = struct_size(pointer)?;
            out_array(pointer.cast::<u8>(), size, T::NAME)?
        };
        Ok(VersionedOut { bytes, version: std::marker::PhantomData })
    }

    /// Fills the struct except `struct_size`. Fields that this version lacks become zero.
    pub(super) fn set(&self, value: T) {
        let source: *const T = &raw const value;
        // SAFETY: the bytes of `value`, which lives until this returns; a `MaybeUninit` need not be initialized.
        let source = unsafe { std::slice::from_raw_parts(source.cast::<MaybeUninit<u8>>(), size_of::<T>()) };
        let rest = std::iter::repeat(MaybeUninit::new(0));
        for (to, from) in self.bytes.iter().zip(source.iter().copied().chain(rest)).skip(size_of::<usize>()) {
            to.set(from);
        }
    }
}
