//! The C functions: any bytes as a file, any sequence of calls on it, with buffers of exact sizes. `reading` has the
//! calls that read, `writing` those that write and open the result.
//!
//! The results of each call are compared with the bytes of the file. AddressSanitizer detects accesses out of bounds.

mod reading;
mod writing;

use std::ffi::CStr;
use std::ptr::{null, null_mut};

use safetensors_torch::ErrorKind;
use safetensors_torch::capi::*;

use crate::directory::{HAS_FILES, replace, with_path};
use crate::{frame, json};

const OK: sft_status = 0;
const INVALID: sft_status = ErrorKind::InvalidArgument as sft_status;
const CLOSED: sft_status = ErrorKind::Closed as sft_status;

/// The largest size of generated data after a header.
const MAX_DATA: u64 = 1 << 16;

/// The largest number of tensors that one call checks.
const MANY: usize = 16;

/// How the file is opened.
const FROM_FILE: u8 = 1;
const FRAMED: u8 = 2;

/// Runs the target. `bytes`: the number of calls, options of opening (two bytes), four bytes per call, then the file.
pub fn run(bytes: &[u8]) {
    let [count, how, options, rest @ ..] = bytes else { return };
    let (script, file) = rest.split_at(rest.len().min(usize::from(count % 32) * 4));
    let made = if how & FRAMED == 0 {
        None
    } else {
        let json = frame::header_of(file);
        frame::whole_file(json, frame::data_end(json::read(json).as_ref()), MAX_DATA)
    };
    // Allocated with the exact length, so that a read beyond it is detected.
    let file: Box<[u8]> = made.map_or_else(|| file.into(), Vec::into_boxed_slice);
    let Some(mut session) = Session::open(&file, how & FROM_FILE != 0 && HAS_FILES, *options) else { return };
    for call in script.chunks_exact(4) {
        session.call(call[0], call[1].into(), call[2].into(), call[3].into());
    }
}

/// Checks a status, and the message of an error. Returns whether the call succeeded.
fn check(status: sft_status) -> bool {
    assert_ne!(status, ErrorKind::Panic as sft_status);
    // SAFETY: these texts end in NUL, and stay valid until the next call that fails (header).
    let texts = unsafe {
        [
            CStr::from_ptr(sft_last_error_get_message()),
            CStr::from_ptr(sft_status_get_name(status)),
            CStr::from_ptr(sft_status_get_message(status)),
        ]
    };
    let [message, name, meaning] = texts.map(|text| text.to_str().expect("UTF-8"));
    assert!(name != "unknown status" && !meaning.is_empty());
    assert!(status == OK || !message.is_empty());
    status == OK
}

/// Returns the text that a string of the library refers to.
fn read(text: &sft_str) -> &str {
    // SAFETY: the string borrows `length` bytes of UTF-8 (header), and the callers here use them while the file is
    // open.
    let bytes = unsafe { std::slice::from_raw_parts(text.data.cast::<u8>(), text.length) };
    std::str::from_utf8(bytes).expect("UTF-8")
}

fn no_text() -> sft_str {
    sft_str { data: null(), length: 0 }
}

/// An open file, and a writer beside it.
struct Session<'b> {
    bytes: &'b [u8],
    file: *mut sft_file,
    writer: *mut sft_writer,
    /// Whether the file is closed, so that every call must fail.
    closed: bool,
    /// Whether tensors are in memory.
    in_memory: bool,
    count: usize,
    /// Done once at most, because it is slow.
    checkpoint_done: bool,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // SAFETY: both handles came from the library, and are not used again. The writer borrows from the file, so it
        // is freed first.
        unsafe {
            sft_writer_free(self.writer);
            sft_file_free(self.file);
        }
    }
}

impl<'b> Session<'b> {
    /// Opens the bytes. Returns `None` if they are not a valid file.
    fn open(bytes: &'b [u8], from_file: bool, options: u8) -> Option<Session<'b>> {
        let (mut file, mut writer) = (null_mut(), null_mut());
        let options = sft_open_options {
            struct_size: size_of::<sft_open_options>() + usize::from(options >> 7),
            backend: (options & 3).into(),
            prefault: (options >> 2 & 3).into(),
        };
        let usable = !from_file || (options.backend < 2 && options.prefault < 3);
        // A struct size larger than the struct requires that many bytes.
        let padded = [options, sft_open_options { struct_size: 0, backend: 0, prefault: 0 }];
        // SAFETY: the bytes and the options outlive the calls, the bytes the handle too; the handles are written to.
        let status = unsafe {
            if from_file {
                with_path("f.safetensors", |path, text| {
                    replace(path, bytes);
                    sft_file_open(text.as_ptr(), padded.as_ptr(), &mut file)
                })
            } else {
                sft_file_open_buffer(bytes.as_ptr().cast(), bytes.len(), &mut file)
            }
        };
        if !check(status) {
            assert!(file.is_null());
            return None;
        }
        assert!(!file.is_null() && usable);
        let mut count = 0;
        // SAFETY: an open handle, and places for results.
        unsafe {
            assert!(check(sft_writer_new(&mut writer)));
            assert!(check(sft_file_get_tensor_count(file, &mut count)));
        }
        let in_memory = !from_file || options.backend == SFT_BACKEND_MMAP;
        Some(Session { bytes, file, writer, closed: false, in_memory, count, checkpoint_done: false })
    }

    /// Checks the status of a valid call, which fails only if the file is closed.
    fn check(&self, status: sft_status) -> bool {
        assert_eq!(status == CLOSED, self.closed, "{status}");
        check(status)
    }

    /// Returns an index of a tensor, sometimes one out of range.
    fn index(&self, a: usize) -> usize {
        if a == 255 { usize::MAX } else { a % (self.count + 1) }
    }

    fn call(&mut self, what: u8, a: usize, b: usize, c: usize) {
        match what % 16 {
            0 => drop(self.tensor(a, b)),
            1 => self.sorted(a),
            2 => self.find(a, b),
            3 => self.metadata(a, b),
            4 => self.data(a),
            5 => self.read(a, b),
            6 => self.read_many(a, b, c),
            7 | 8 => self.slice(a, b, c),
            9 if b == 7 => self.close(),
            9 => self.wrong_pointers(a),
            10 => self.add_tensor(a, b, c),
            11 => self.add_metadata(a, b),
            12 => self.write_buffer(a, b),
            13 => dtypes(a, b, c),
            14 if !self.checkpoint_done && HAS_FILES => self.checkpoint(a, b),
            15 if HAS_FILES => self.write_file(a),
            _ => {}
        }
    }

    fn close(&mut self) {
        // The writer may borrow from the file.
        // SAFETY: this struct owns the handles, and nothing else uses them.
        unsafe {
            sft_writer_free(self.writer);
            self.writer = null_mut();
            assert!(check(sft_writer_new(&mut self.writer)));
            assert!(check(sft_file_close(self.file)));
        }
        self.closed = true;
    }

    /// Checks that NULL and misaligned pointers are refused.
    fn wrong_pointers(&self, a: usize) {
        let mut words = [0u64; 4];
        let odd = words.as_mut_ptr().cast::<u8>().wrapping_add(1);
        let mut count = 0;
        // SAFETY: NULL and misaligned pointers are refused, not followed (header).
        let status = unsafe {
            match a % 10 {
                0 => sft_file_get_tensor_count(null(), &mut count),
                1 => sft_file_get_tensor_count(odd.cast(), &mut count),
                2 => sft_file_open_buffer(null(), 8, odd.cast()),
                3 => sft_file_open(null(), null(), (&raw mut words).cast()),
                4 => sft_writer_add_metadata(self.writer, null(), 3, null(), 0),
                5 => sft_writer_add_tensor(self.writer, c"n".as_ptr(), 1, 4, odd.cast(), 1, null(), 0),
                6 => sft_writer_get_size(null(), null(), words.as_mut_ptr()),
                7 => sft_writer_add_tensor(self.writer, c"n".as_ptr(), usize::MAX, 4, null(), 0, null(), 1),
                8 => sft_checkpoint_open(null(), null(), (&raw mut words).cast()),
                _ => sft_checkpoint_get_tensor_count(odd.cast(), &mut count),
            }
        };
        assert_eq!(status, INVALID);
        check(status);
    }
}

/// Calls the functions of dtypes: codes and sizes of shapes.
fn dtypes(a: usize, b: usize, c: usize) {
    let number = (a % 24) as u32;
    let code = sft_dtype_get_code(number);
    assert_eq!(code.is_null(), sft_dtype_get_bits(number) == 0);
    let shape = [b as u64, 1 << (c % 64), (b * c) as u64, u64::MAX];
    let mut nbytes = u64::MAX;
    // SAFETY: `rank` dimensions, a place for a number; a code ends in NUL.
    unsafe {
        let ok = check(sft_dtype_compute_nbytes(number, shape.as_ptr(), c % 5, &mut nbytes));
        assert_eq!(ok, nbytes != u64::MAX);
        let mut again = u32::MAX;
        if !code.is_null() {
            assert!(check(sft_dtype_parse(code, &mut again)));
            assert_eq!(again, number);
        }
    }
}
