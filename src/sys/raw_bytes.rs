//! Memory that others may change while it is written to a file.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// The bytes of a tensor that is saved: an address and a length.
///
/// Tensors are no slices because other threads may write to them, and other processes to a mapped file: a reference to
/// such memory would be undefined behaviour. The layout is that of the kernel's `struct iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RawBytes<'a> {
    start: *const u8,
    length: usize,
    lifetime: PhantomData<&'a [u8]>,
}

const _: () = assert!(size_of::<RawBytes<'static>>() == size_of::<libc::iovec>());

// SAFETY: the bytes are only read, and `RawBytes::new` requires that any thread may read them during `'a`.
unsafe impl Send for RawBytes<'_> {}
// SAFETY: as above.
unsafe impl Sync for RawBytes<'_> {}

impl<'a, T: AsRef<[u8]> + ?Sized> From<&'a T> for RawBytes<'a> {
    fn from(bytes: &'a T) -> RawBytes<'a> {
        let bytes = bytes.as_ref();
        RawBytes { start: bytes.as_ptr(), length: bytes.len(), lifetime: PhantomData }
    }
}

impl<'a> RawBytes<'a> {
    /// Returns the `length` bytes at `start`.
    ///
    /// # Safety
    ///
    /// The bytes must be valid for reads on any thread during `'a`. Others may change them.
    pub unsafe fn new(start: *const u8, length: usize) -> RawBytes<'a> {
        RawBytes { start, length, lifetime: PhantomData }
    }

    pub(crate) fn of_slices(slices: &[&'a [u8]]) -> Vec<RawBytes<'a>> {
        slices.iter().map(|&bytes| bytes.into()).collect()
    }

    /// Returns the address of the first byte.
    pub fn as_ptr(self) -> *const u8 {
        self.start
    }

    /// Returns the number of bytes.
    pub fn len(self) -> usize {
        self.length
    }

    /// Returns whether there are no bytes.
    pub fn is_empty(self) -> bool {
        self.length == 0
    }

    /// Splits the bytes at `middle`, which must not exceed their number.
    pub(crate) fn split_at(self, middle: usize) -> (RawBytes<'a>, RawBytes<'a>) {
        let length = self.length.checked_sub(middle).expect("the middle is inside");
        (
            RawBytes { length: middle, ..self },
            RawBytes { start: self.start.wrapping_add(middle), length, ..self },
        )
    }

    /// Returns the bytes in `range`, which must be inside.
    pub(crate) fn part(self, range: Range<usize>) -> RawBytes<'a> {
        self.split_at(range.end).0.split_at(range.start).1
    }

    /// Appends a copy of the bytes to `buffer`.
    pub(crate) fn append_to(self, buffer: &mut Vec<u8>) {
        buffer.reserve(self.length);
        // SAFETY: the bytes are valid for reads (`RawBytes::new`), and as many fit behind those of `buffer`, which nothing
        // else refers to. `set_len` requires that they are initialized: they have just been written.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.start,
                buffer.spare_capacity_mut().as_mut_ptr().cast(),
                self.length,
            );
            buffer.set_len(buffer.len() + self.length);
        }
    }

    /// Removes the first `count` bytes from `pieces`.
    pub(crate) fn advance<'p>(
        mut pieces: &'p mut [RawBytes<'a>],
        mut count: usize,
    ) -> &'p mut [RawBytes<'a>] {
        while let Some(first) = pieces.first_mut() {
            if count < first.length {
                *first = first.split_at(count).1;
                break;
            }
            count -= first.length;
            pieces = &mut pieces[1..];
        }
        pieces
    }
}

/// Writes some bytes of `pieces`, in their order, at the file's position. Returns how many.
pub(crate) fn write(file: &File, pieces: &[RawBytes<'_>]) -> io::Result<usize> {
    let count = libc::c_int::try_from(pieces.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: each element has the layout of an iovec and is valid for reads during its lifetime (`RawBytes::new`). The
    // kernel only reads.
    match unsafe { libc::writev(file.as_raw_fd(), pieces.as_ptr().cast(), count) } {
        written if written >= 0 => Ok(written as usize),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes all of `bytes` at `offset`.
pub(crate) fn write_all_at(file: &File, mut bytes: RawBytes<'_>, mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let position = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the bytes are valid for reads during their lifetime (`RawBytes::new`). The kernel only reads.
        match unsafe { libc::pwrite64(file.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), position) } {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written if written > 0 => {
                bytes = bytes.split_at(written as usize).1;
                offset += written as u64;
            }
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}
