//! Bytes that a program reads by its own means: an object in a bucket, a file in an archive, a cache.
//!
//! Each request to such a source is expensive, so neighbouring ranges are read with one, and small gaps with them.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// The most bytes of one request.
pub(crate) const REQUEST_BYTES: usize = 8 << 20;

/// Gaps up to this size are read with their neighbours: a request to a bucket takes as long as half a mebibyte of data, or
/// longer.
const GAP_BYTES: u64 = 512 << 10;

/// The bytes that are read at once from the start, where the header is.
const START_BYTES: u64 = 1 << 20;

/// The bytes of a file that a program reads by its own means.
///
/// Several threads call the functions at once.
///
/// ```
/// use safetensors_torch::{ByteSource, Destination, Error, ErrorKind, Result, TensorFile};
///
/// #[derive(Debug)]
/// struct Bytes(Vec<u8>);
///
/// impl ByteSource for Bytes {
///     fn length(&self) -> Result<u64> {
///         Ok(self.0.len() as u64)
///     }
///
///     fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<()> {
///         let start = offset as usize;
///         let bytes = self.0.get(start..start + destination.remaining());
///         let changed = || Error::new(ErrorKind::FileChanged, "the bytes end early");
///         destination.write(bytes.ok_or_else(changed)?);
///         Ok(())
///     }
/// }
///
/// let bytes = Bytes(b"\x08\0\0\0\0\0\0\0{}      ".to_vec());
/// let file = TensorFile::from_source(Box::new(bytes), "memory://model.safetensors".as_ref())?;
/// assert!(file.header().is_empty());
/// # Ok::<(), Error>(())
/// ```
pub trait ByteSource: fmt::Debug + Send + Sync {
    /// Returns the number of bytes. Called once.
    ///
    /// # Errors
    ///
    /// Any; opening the file returns it.
    fn length(&self) -> Result<u64>;

    /// Returns what identifies the bytes that the last call of `length` or `read` on this thread was about, such as an ETag:
    /// if it changes, reads fail with [`ErrorKind::FileChanged`]. Called after each of these calls. `None` if the source
    /// makes sure by itself that its bytes do not change.
    ///
    /// # Errors
    ///
    /// Any; the read returns it.
    fn identity(&self) -> Result<Option<String>> {
        Ok(None)
    }

    /// Returns how many calls of `read` the source can answer at once, at least 1; `None` if it can answer as many as suit
    /// the library. With 1, a load reads in the order of the file, as a stream needs it. Called once, after `length`.
    fn max_requests(&self) -> Option<usize> {
        None
    }

    /// Writes the bytes from `offset` on to `destination`, until [`Destination::remaining`] is 0. They are at most 8 MiB and
    /// inside the length.
    ///
    /// # Errors
    ///
    /// Any; the read returns it. [`ErrorKind::FileChanged`] if the source has other bytes than before.
    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<()>;
}

/// Memory for consecutive bytes of a source, in several pieces. It is filled from its start to its end.
#[derive(Debug)]
pub struct Destination<'a> {
    pieces: &'a [Piece],
    /// The piece that the next byte goes to, and how many of its bytes are written.
    next: usize,
    written: usize,
    remaining: usize,
}

/// A piece of a destination.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Piece {
    /// Its first byte.
    pub start: *mut u8,
    /// Its size in bytes.
    pub length: usize,
}

impl<'a> Destination<'a> {
    /// # Safety
    ///
    /// Every piece must be valid for writes of its length, and nobody else may use it, as long as the result lives.
    unsafe fn new(pieces: &'a [Piece]) -> Destination<'a> {
        let remaining = pieces.iter().map(|piece| piece.length).sum();
        Destination { pieces, next: 0, written: 0, remaining }
    }

    /// Returns how many bytes are still to be written.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Writes the next bytes.
    ///
    /// # Panics
    ///
    /// If they are more than remain.
    pub fn write(&mut self, mut bytes: &[u8]) {
        assert!(bytes.len() <= self.remaining, "{} bytes where {} remain", bytes.len(), self.remaining);
        self.remaining -= bytes.len();
        while !bytes.is_empty() {
            let Piece { start, length } = self.pieces[self.next];
            let (now, later) = bytes.split_at(bytes.len().min(length - self.written));
            // SAFETY: `now` fits into the rest of the piece, which is valid for writes and used by nobody else (`new`).
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), start.add(self.written), now.len()) };
            self.written += now.len();
            if self.written == length {
                (self.next, self.written) = (self.next + 1, 0);
            }
            bytes = later;
        }
    }

    /// Returns all pieces, for code that writes to them by itself.
    pub fn pieces(&self) -> &'a [Piece] {
        self.pieces
    }

    /// Notes that all pieces are written.
    ///
    /// # Safety
    ///
    /// They must be.
    pub unsafe fn set_written(&mut self) {
        (self.next, self.written, self.remaining) = (self.pieces.len(), 0, 0);
    }
}

/// An open source.
#[derive(Debug)]
pub(crate) struct ExternalSource {
    source: Box<dyn ByteSource>,
    name: PathBuf,
    length: u64,
    identity: Option<String>,
    max_requests: usize,
    /// The bytes of the start, while the header is read; all bytes of a small source.
    start: Vec<u8>,
}

impl ExternalSource {
    /// Asks for the length, and reads the start. `name` is for errors.
    pub(crate) fn open(source: Box<dyn ByteSource>, name: &Path) -> Result<ExternalSource> {
        let length = source.length().map_err(|error| error.in_source(name))?;
        let identity = source.identity().map_err(|error| error.in_source(name))?;
        let max_requests = source.max_requests().unwrap_or(usize::MAX).max(1);
        let (name, start) = (name.to_path_buf(), Vec::new());
        let mut opened = ExternalSource { source, name, length, identity, max_requests, start };
        let mut start = vec![0; length.min(START_BYTES) as usize];
        opened.read_exact(&mut start, 0)?;
        opened.start = start;
        Ok(opened)
    }

    /// Returns whether the source still has the bytes that were read from its start.
    pub(crate) fn is_unchanged(&mut self) -> Result<bool> {
        self.start = Vec::new();
        match self.read_exact(&mut [0; 1][..self.length.min(1) as usize], 0) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::FileChanged => Ok(false),
            Err(error) if error.os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// Returns how many threads may call [`ExternalSource::read`] at once.
    pub(crate) fn max_requests(&self) -> usize {
        self.max_requests
    }

    /// Forgets the start, which only the header was needed from, unless it is everything.
    pub(crate) fn forget_start(&mut self) {
        if (self.start.len() as u64) < self.length {
            self.start = Vec::new();
        }
    }

    /// Fills `buffer` with the bytes from `offset` on.
    pub(crate) fn read_exact(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let piece = Piece { start: buffer.as_mut_ptr(), length: buffer.len() };
        // SAFETY: the piece is the buffer, which is borrowed exclusively.
        unsafe { self.read(std::iter::once((offset, piece))) }
    }

    /// Reads pieces, each from its offset on, on this thread; neighbours and small gaps between them with one request.
    ///
    /// # Safety
    ///
    /// Every piece must be valid for writes of its length. None may overlap another.
    pub(crate) unsafe fn read(&self, pieces: impl Iterator<Item = (u64, Piece)>) -> Result<()> {
        let mut request = Request::default();
        let mut gap_bytes = Vec::new();
        for (mut offset, mut piece) in pieces {
            while piece.length > 0 {
                let gap = offset.checked_sub(request.end()).filter(|&gap| gap <= GAP_BYTES);
                let room = gap.map_or(0, |gap| REQUEST_BYTES.saturating_sub(request.bytes + gap as usize));
                if room == 0 && request.bytes > 0 {
                    // SAFETY: this function's contract covers the pieces; nothing is read from those of gaps.
                    unsafe { self.request(&request) }?;
                    request = Request::default();
                    continue;
                }
                if request.bytes == 0 {
                    request.offset = offset;
                }
                let gap = (offset - request.end()) as usize;
                if gap > 0 {
                    // All gaps share this memory: nobody reads it.
                    gap_bytes.resize(GAP_BYTES as usize, 0);
                    request.add(gap_bytes.as_mut_ptr(), gap);
                }
                let taken = piece.length.min(REQUEST_BYTES - request.bytes);
                request.add(piece.start, taken);
                offset += taken as u64;
                piece = Piece { start: piece.start.wrapping_add(taken), length: piece.length - taken };
            }
        }
        // SAFETY: as above.
        unsafe { self.request(&request) }
    }

    /// # Safety
    ///
    /// Every piece must be valid for writes of its length.
    unsafe fn request(&self, request: &Request) -> Result<()> {
        if request.bytes == 0 {
            return Ok(());
        }
        let Request { offset, bytes, pieces } = request;
        let outside = || {
            let detail = "the source has fewer bytes than its header says: it was replaced; open it again";
            Error::new(ErrorKind::FileChanged, detail).in_source(&self.name)
        };
        let end = offset.checked_add(*bytes as u64).filter(|&end| end <= self.length).ok_or_else(outside)?;
        // SAFETY: this function's contract covers the pieces, and this call has them alone.
        let mut destination = unsafe { Destination::new(pieces) };
        if let Some(known) = self.start.get(*offset as usize..end as usize) {
            destination.write(known);
            return Ok(());
        }
        self.source.read(*offset, &mut destination).map_err(|error| error.in_source(&self.name))?;
        if destination.remaining() > 0 {
            let detail = format!(
                "the source returned {} of {bytes} bytes at offset {offset}: fix its read function",
                bytes - destination.remaining()
            );
            return Err(Error::new(ErrorKind::Io, detail).in_source(&self.name));
        }
        let identity = self.source.identity().map_err(|error| error.in_source(&self.name))?;
        if identity != self.identity {
            let detail = "the source was replaced while it was read; open it again";
            return Err(Error::new(ErrorKind::FileChanged, detail).in_source(&self.name));
        }
        Ok(())
    }
}

/// Consecutive bytes, and where they go.
#[derive(Default)]
struct Request {
    offset: u64,
    bytes: usize,
    pieces: Vec<Piece>,
}

impl Request {
    fn end(&self) -> u64 {
        self.offset + self.bytes as u64
    }

    fn add(&mut self, start: *mut u8, length: usize) {
        self.bytes += length;
        match self.pieces.last_mut() {
            Some(last) if last.start.wrapping_add(last.length) == start => last.length += length,
            _ => self.pieces.push(Piece { start, length }),
        }
    }
}
