//! Every cast between C pointers and Rust's: the only file of the C ABI that turns one into the other.
//!
//! What can be seen of a pointer is checked here: NULL, alignment, lengths, UTF-8. What cannot is the caller's promise,
//! and each function says which.

use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::sft_str;
use crate::error::{Error, ErrorKind, Result};

/// No struct of this ABI is larger; a larger size is a size that was never set.
const MAX_STRUCT_BYTES: usize = 4096;

pub(super) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, detail)
}

fn check<T>(pointer: *const T, what: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(invalid(format!("{what} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(invalid(format!("{what} is not aligned to {} bytes", align_of::<T>())));
    }
    Ok(())
}

/// Hands `value` to C, which gives it back to [`release`].
pub(super) fn hand_over<T>(value: T) -> *mut T {
    Box::into_raw(Box::new(value))
}

/// Takes back what [`hand_over`] gave, and drops it; NULL is nothing.
///
/// # Safety
///
/// `handle` is NULL, or came from [`hand_over`] and was not released, and nobody uses it any more.
pub(super) unsafe fn release<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(handle) });
    }
}

/// A handle or a struct to read.
///
/// # Safety
///
/// `pointer` is NULL or points to a `T` that nobody changes during the call.
pub(super) unsafe fn shared<'a, T>(pointer: *const T, what: &str) -> Result<&'a T> {
    check(pointer, what)?;
    // SAFETY: neither NULL nor misaligned; the rest is the caller's promise.
    Ok(unsafe { &*pointer })
}

/// A handle to change.
///
/// # Safety
///
/// `pointer` is NULL or points to a `T` that nobody else uses during the call.
pub(super) unsafe fn exclusive<'a, T>(pointer: *mut T, what: &str) -> Result<&'a mut T> {
    check(pointer, what)?;
    // SAFETY: neither NULL nor misaligned; the rest is the caller's promise.
    Ok(unsafe { &mut *pointer })
}

/// A place that a result goes to, checked before any work is done.
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// # Safety
    ///
    /// `pointer` is NULL or valid for the write of a `T` during the call. It may hold anything yet.
    pub(super) unsafe fn new(pointer: *mut T, what: &str) -> Result<Out<T>> {
        check(pointer, what)?;
        Ok(Out(pointer))
    }

    pub(super) fn set(&self, value: T) {
        // SAFETY: checked, and promised by whoever made `self`; no destructor runs on what was there before, as that
        // may be no `T` yet.
        unsafe { self.0.write(value) }
    }
}

/// An array to read; NULL will do where it has no element.
///
/// # Safety
///
/// `pointer` is NULL or valid for reads of `length` elements, which nobody changes while the result is in use.
pub(super) unsafe fn array<'a, T>(pointer: *const T, length: usize, what: &str) -> Result<&'a [T]> {
    if length == 0 {
        return Ok(&[]);
    }
    check(pointer, what)?;
    check_length::<T>(length, what)?;
    // SAFETY: neither NULL nor misaligned nor too long; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, length) })
}

/// An array to write to; NULL will do where it has no element.
///
/// The result is a pointer: the memory may hold nothing yet, and a Rust slice must hold values.
pub(super) fn destination<T>(pointer: *mut T, length: usize, what: &str) -> Result<*mut T> {
    if length == 0 {
        return Ok(std::ptr::NonNull::dangling().as_ptr());
    }
    check(pointer, what)?;
    check_length::<T>(length, what)?;
    Ok(pointer)
}

fn check_length<T>(length: usize, what: &str) -> Result<()> {
    match length.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(invalid(format!("{what} has {length} elements, more than memory can hold"))),
    }
}

/// Copies `values` to an array of C.
///
/// # Safety
///
/// `pointer` is NULL or valid for writes of as many elements as `values` has, and is no part of it.
pub(super) unsafe fn copy_out<T: Copy>(values: &[T], pointer: *mut T, what: &str) -> Result<()> {
    let pointer = destination(pointer, values.len(), what)?;
    // SAFETY: checked, and the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), pointer, values.len()) };
    Ok(())
}

/// Bytes of any meaning.
///
/// # Safety
///
/// As for [`array`].
pub(super) unsafe fn bytes<'a>(pointer: *const c_void, length: usize, what: &str) -> Result<&'a [u8]> {
    // SAFETY: the caller's promise.
    unsafe { array(pointer.cast::<u8>(), length, what) }
}

/// UTF-8 text with a length, in which NUL is a character.
///
/// # Safety
///
/// As for [`array`].
pub(super) unsafe fn text<'a>(pointer: *const c_char, length: usize, what: &str) -> Result<&'a str> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { array(pointer.cast::<u8>(), length, what) }?;
    std::str::from_utf8(bytes)
        .map_err(|error| invalid(format!("{what} is not UTF-8: bad byte at {}", error.valid_up_to())))
}

/// A string that ends in NUL.
///
/// # Safety
///
/// `pointer` is NULL or points to bytes up to a NUL, which nobody changes while the result is in use.
pub(super) unsafe fn c_string<'a>(pointer: *const c_char, what: &str) -> Result<&'a CStr> {
    check(pointer, what)?;
    // SAFETY: not NULL; the rest is the caller's promise.
    Ok(unsafe { CStr::from_ptr(pointer) })
}

/// A path that ends in NUL, in the bytes of the file system.
///
/// # Safety
///
/// As for [`c_string`].
pub(super) unsafe fn path<'a>(pointer: *const c_char) -> Result<&'a Path> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { c_string(pointer, "path") }?.to_bytes();
    Ok(Path::new(OsStr::from_bytes(bytes)))
}

/// Text as C sees it; valid as long as `text` is.
pub(super) fn lend(text: &str) -> sft_str {
    sft_str { data: text.as_ptr().cast(), length: text.len() }
}

/// A struct that begins with its own size, `struct_size`, and grows at its end from version to version.
///
/// # Safety
///
/// The type is `repr(C)`, its first field is that `usize`, and every pattern of bits is a value of it.
pub(super) unsafe trait Versioned: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// The size that it had in the first version of the ABI.
    const FIRST_SIZE: usize;
}

/// # Safety
///
/// `pointer` is NULL or points to at least a `usize`.
unsafe fn struct_size<T: Versioned>(pointer: *const T) -> Result<usize> {
    check(pointer, T::NAME)?;
    // SAFETY: checked, and the first field of every versioned struct is its size.
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

/// Options of this or another version of the header: fields that the caller's version has not are those of `defaults`,
/// fields that this version has not must be zero. NULL asks for `defaults`.
///
/// # Safety
///
/// `pointer` is NULL or valid for reads of as many bytes as its `struct_size` says.
pub(super) unsafe fn options<T: Versioned>(pointer: *const T, defaults: T) -> Result<T> {
    if pointer.is_null() {
        return Ok(defaults);
    }
    // SAFETY: the caller's promise.
    let size = unsafe { struct_size(pointer) }?;
    let known = size.min(size_of::<T>());
    // SAFETY: the caller vouches for `size` bytes.
    let given = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), size) };
    if given[known..].iter().any(|&byte| byte != 0) {
        return Err(invalid(format!(
            "{}: sets a field that version {} of the library does not know",
            T::NAME,
            env!("CARGO_PKG_VERSION")
        )));
    }
    let mut options = defaults;
    // SAFETY: `known` bytes are there on both sides, and every pattern of bits is a `T` (`Versioned`).
    unsafe { std::ptr::copy_nonoverlapping(given.as_ptr(), (&raw mut options).cast::<u8>(), known) };
    Ok(options)
}

/// A struct that C wants filled: as much of it as its version has; what this version does not know becomes zero.
pub(super) struct VersionedOut<T> {
    pointer: *mut T,
    size: usize,
}

impl<T: Versioned> VersionedOut<T> {
    /// # Safety
    ///
    /// `pointer` is NULL or valid for reads of its `struct_size`, and for writes of so many bytes during the call.
    pub(super) unsafe fn new(pointer: *mut T) -> Result<VersionedOut<T>> {
        // SAFETY: the caller's promise.
        let size = unsafe { struct_size(pointer) }?;
        Ok(VersionedOut { pointer, size })
    }

    /// Fills the struct; its `struct_size` stays as the caller set it.
    pub(super) fn set(&self, value: T) {
        let known = self.size.min(size_of::<T>());
        let header = size_of::<usize>();
        let target = self.pointer.cast::<u8>();
        // SAFETY: whoever made `self` vouches for `size` bytes, of which `known` and the rest are written; `known` is
        // no more than `value` has, and at least `FIRST_SIZE`, which holds the size field.
        unsafe {
            let source = (&raw const value).cast::<u8>();
            std::ptr::copy_nonoverlapping(source.add(header), target.add(header), known - header);
            target.add(known).write_bytes(0, self.size - known);
        }
    }
}
