//! Reads that bypass the page cache (`O_DIRECT`): the setting of the process, and the reads.
//!
//! A device writes whole blocks, to addresses that are multiples of its block size. Memory that was made for direct reads
//! (`Buffers::for_direct_reads`) has the blocks of the file, so most are read in place.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::huge_pages::is_resident;
use crate::sys::mutex::Mutex;

/// The environment variable that applies until [`set_direct`] is called.
const VARIABLE: &str = "SAFETENSORS_TORCH_DIRECT";

/// A multiple of the block size of every common device.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// Whether reads into memory bypass the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Direct {
    /// If the file is not in the page cache, and its storage is fast ([`StorageSpeed`]).
    #[default]
    Auto = 0,
    /// Never: a file that was read stays in the page cache.
    Never = 1,
    /// Even if the file is in the page cache, which takes several times as long.
    Always = 2,
}

/// The setting, or [`UNREAD`] before it was set or read from the environment.
static SETTING: AtomicU8 = AtomicU8::new(UNREAD);

const UNREAD: u8 = u8::MAX;

/// Sets whether large reads into memory bypass the page cache, for the whole process and from the next call on.
pub fn set_direct(direct: Direct) {
    SETTING.store(direct as u8, Ordering::Relaxed);
}

/// Returns the setting of [`set_direct`]; before the first call, the environment variable `SAFETENSORS_TORCH_DIRECT`
/// (`auto`, `0` or `1`), or [`Direct::Auto`].
///
/// # Errors
///
/// [`ErrorKind::InvalidArgument`] if the variable has another value.
pub fn direct() -> Result<Direct> {
    if let Some(direct) = Direct::from_number(SETTING.load(Ordering::Relaxed)) {
        return Ok(direct);
    }
    let direct = parse(&std::env::var_os(VARIABLE).unwrap_or_default())?;
    // A call of `set_direct` in the meantime takes precedence.
    let set = SETTING.compare_exchange(UNREAD, direct as u8, Ordering::Relaxed, Ordering::Relaxed);
    Ok(set.err().and_then(Direct::from_number).unwrap_or(direct))
}

fn parse(text: &OsStr) -> Result<Direct> {
    match text.to_str() {
        Some("" | "auto") => Ok(Direct::Auto),
        Some("0") => Ok(Direct::Never),
        Some("1") => Ok(Direct::Always),
        _ => {
            let detail =
                format!("environment variable {VARIABLE}: unknown value {text:?}; set it to auto, 0 or 1");
            Err(Error::new(ErrorKind::InvalidArgument, detail))
        }
    }
}

impl Direct {
    /// Returns the setting with this number.
    pub(crate) fn from_number(number: u8) -> Option<Direct> {
        [Direct::Auto, Direct::Never, Direct::Always].into_iter().find(|&direct| direct as u8 == number)
    }
}

/// Opens `file` again, for reads that bypass the page cache. `None` if its filesystem has none.
pub(crate) fn reopen(file: &File) -> Option<File> {
    let flags = libc::O_DIRECT | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // The path would lead to another file after a rename.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(flags).open(path).ok()
}

/// The bytes of a file that are read directly before the speed matters.
const TRIAL_BYTES: u64 = 32 << 20;

/// Storage that gives at least as many bytes in a second is fast.
const FAST_BYTES: u64 = 1 << 30;

/// How reads of a file that is not cached went: whether its filesystem refused direct ones, and how fast they were. The page
/// cache costs slow storage no time, and the next load of the file, or another process, finds it there. Several processes
/// that read from one disk have slow storage too. Reads through the page cache count too, so that a short delay of the first
/// reads does not make storage slow for good.
#[derive(Debug, Default)]
pub(crate) struct StorageSpeed {
    progress: Mutex<Progress>,
    is_refused: AtomicBool,
}

/// The bytes of the finished reads, and the time in which there was a read.
#[derive(Debug, Default)]
struct Progress {
    bytes: u64,
    /// Without the period since `since`.
    time: Duration,
    /// The number of reads in progress, and their bytes.
    reading: usize,
    reading_bytes: u64,
    /// When the first of these began.
    since: Option<Instant>,
}

impl Progress {
    fn begin(&mut self, bytes: u64, now: Instant) {
        self.reading += 1;
        self.reading_bytes += bytes;
        self.since.get_or_insert(now);
    }

    fn end(&mut self, bytes: u64, now: Instant) {
        self.bytes += bytes;
        self.reading -= 1;
        self.reading_bytes -= bytes;
        if self.reading == 0 {
            self.time += self.since.take().map_or(Duration::ZERO, |since| now.duration_since(since));
        }
    }

    fn is_fast(&self, now: Instant) -> bool {
        let time = self.time + self.since.map_or(Duration::ZERO, |since| now.duration_since(since));
        // The reads in progress are done by half, on average: at the beginning they are most of what was read.
        let bytes = self.bytes + self.reading_bytes / 2;
        self.bytes < TRIAL_BYTES
            || u128::from(bytes) * 1_000_000_000 >= u128::from(FAST_BYTES) * time.as_nanos()
    }
}

impl StorageSpeed {
    /// Returns whether the reads are fast together, or whether that is not known yet.
    pub(crate) fn is_fast(&self) -> bool {
        self.progress.lock().is_fast(Instant::now())
    }

    /// Returns whether the filesystem refused a read.
    pub(crate) fn is_refused(&self) -> bool {
        self.is_refused.load(Ordering::Relaxed)
    }

    /// Starts to time a read of `bytes` that are not cached, directly or through the page cache.
    pub(crate) fn start(&self, bytes: usize) -> ReadTimer<'_> {
        self.progress.lock().begin(bytes as u64, Instant::now());
        ReadTimer { speed: self, bytes }
    }
}

/// Counts a read when it is dropped.
pub(crate) struct ReadTimer<'a> {
    speed: &'a StorageSpeed,
    bytes: usize,
}

impl Drop for ReadTimer<'_> {
    fn drop(&mut self) {
        self.speed.progress.lock().end(self.bytes as u64, Instant::now());
    }
}

/// Reads past the page cache. Blocks that lie in the memory of the caller as in the file are read there; the others, at the
/// ends of tensors, are read into a buffer and copied.
///
/// A fork during a read is harmless, although older kernels may give the child a page that the device still writes to: they
/// do that only if the parent writes to the page, and these pages contain nothing else.
#[derive(Debug)]
pub(crate) struct DirectReader<'a> {
    file: &'a File,
    speed: &'a StorageSpeed,
    /// Never filled; the device writes to its spare capacity.
    buffer: Vec<u8>,
}

impl<'a> DirectReader<'a> {
    /// Reads from `file`, which [`reopen`] returned.
    pub(crate) fn new(file: &'a File, speed: &'a StorageSpeed) -> DirectReader<'a> {
        DirectReader { file, speed, buffer: Vec::new() }
    }

    /// Reads from `offset` on into `parts`, one after the other. Returns false if buffered reads are needed: the filesystem
    /// refuses, or the file ends early. The contents of the parts are then unspecified.
    ///
    /// # Safety
    ///
    /// Every part must be valid for writes of its length.
    pub(crate) unsafe fn read(&mut self, offset: u64, parts: &[libc::iovec]) -> io::Result<bool> {
        let length: usize = parts.iter().map(|part| part.iov_len).sum();
        let begin = offset - block_offset(offset) as u64;
        let whole = (block_offset(offset) + length).next_multiple_of(BLOCK_BYTES);
        // As large as everything, so that a byte has the same distance from the start in both. Memory that is not written is
        // free.
        self.buffer.reserve(whole + BLOCK_BYTES);
        let aligned = self.buffer.as_mut_ptr();
        let aligned = aligned.wrapping_add(aligned.align_offset(BLOCK_BYTES));
        let buffered = |offset: u64| aligned.wrapping_add((offset - begin) as usize);
        let (mut pieces, mut copies) = (Vec::new(), Vec::new());
        let mut piece = |start: *mut u8, length: usize| {
            if length > 0 {
                pieces.push(libc::iovec { iov_base: start.cast(), iov_len: length });
            }
        };
        let (mut planned, mut at) = (begin, offset);
        for part in parts {
            let start: *mut u8 = part.iov_base.cast();
            let blocks = blocks_inside(start.addr(), at, part.iov_len);
            let (head, tail) = if blocks.is_empty() {
                (at..at + part.iov_len as u64, 0..0)
            } else {
                piece(buffered(planned), (blocks.start - planned) as usize);
                piece(start.wrapping_add((blocks.start - at) as usize), (blocks.end - blocks.start) as usize);
                planned = blocks.end;
                (at..blocks.start, blocks.end..at + part.iov_len as u64)
            };
            for bytes in [head, tail].into_iter().filter(|bytes| !bytes.is_empty()) {
                copies.push((start.wrapping_add((bytes.start - at) as usize), bytes));
            }
            at += part.iov_len as u64;
        }
        piece(buffered(planned), (begin + whole as u64 - planned) as usize);
        for piece in &pieces {
            // SAFETY: as for the read below, which fills these bytes.
            unsafe { fault_in(piece.iov_base.cast(), piece.iov_len) };
        }
        let timer = self.speed.start(length);
        // SAFETY: the pieces are `whole` bytes in the buffer, which has as many and room to align them, and in the parts,
        // which are valid (this function's contract).
        let read = unsafe { read_vectored_at(self.file, &pieces, begin) };
        drop(timer);
        match read {
            Ok(count) if count as u64 >= at - begin => {}
            Ok(_) => return Ok(false),
            // The filesystem refuses direct reads, or those with blocks of this size.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                self.speed.is_refused.store(true, Ordering::Relaxed);
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        for (to, bytes) in copies {
            // SAFETY: the bytes are in a piece of the buffer, which was read, because they are in no block inside a part; `to`
            // is in their part.
            unsafe {
                std::ptr::copy_nonoverlapping(buffered(bytes.start), to, (bytes.end - bytes.start) as usize);
            }
        }
        Ok(true)
    }
}

/// Faults in the pages of a piece, unless some of them are resident. Btrfs may read into others through the page cache.
///
/// # Safety
///
/// The piece must be valid for writes, and its bytes unused.
unsafe fn fault_in(start: *mut u8, length: usize) {
    if [length / 2, length - 1].into_iter().all(|at| is_resident(start.wrapping_add(at))) {
        return;
    }
    for at in (0..length).step_by(BLOCK_BYTES) {
        // SAFETY: the byte is in the piece (this function's contract).
        unsafe { start.wrapping_add(at).write_volatile(0) };
    }
}

/// Returns the whole blocks, as offsets in the file, of `length` bytes at `offset` whose memory at `address` has the same
/// blocks. Empty if its blocks are others.
fn blocks_inside(address: usize, offset: u64, length: usize) -> Range<u64> {
    let block = BLOCK_BYTES as u64;
    let blocks = offset.next_multiple_of(block)..(offset + length as u64) / block * block;
    if address % BLOCK_BYTES == block_offset(offset) && !blocks.is_empty() { blocks } else { 0..0 }
}

/// Reads from `offset` of `file` on into `parts`, one after the other. Returns the number of bytes, 0 at the end of the file.
///
/// # Safety
///
/// Every part must be valid for writes of its length.
pub(crate) unsafe fn read_vectored_at(file: &File, parts: &[libc::iovec], offset: u64) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    loop {
        // SAFETY: this function's contract covers the parts; the kernel writes to nothing else.
        let read =
            unsafe { libc::preadv(file.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int, offset) };
        if read >= 0 {
            return Ok(read as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Returns how far `offset` is from the start of its block.
pub(crate) fn block_offset(offset: u64) -> usize {
    (offset % BLOCK_BYTES as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn any_range_is_read_into_any_memory() {
        let bytes: Vec<u8> = (0..5 * BLOCK_BYTES + 77).map(|i| (i / 7) as u8).collect();
        let mut file = tempfile::tempfile_in(".").expect("a file");
        file.write_all(&bytes).expect("written");
        let Some(direct) = reopen(&file) else { return };
        let speed = StorageSpeed::default();
        let mut reader = DirectReader::new(&direct, &speed);
        let mut memory = vec![0u8; bytes.len() + 3 * BLOCK_BYTES];
        let aligned = memory.as_ptr().align_offset(BLOCK_BYTES);
        for start in [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5] {
            for end in [start + 1, 3 * BLOCK_BYTES, bytes.len() - 1, bytes.len()] {
                // In step with the file, with the last part elsewhere, and nowhere in step.
                for (shift, cut) in [(0, end - start), (0, (end - start) / 2), (64, end - start)] {
                    memory.fill(0xEE);
                    let from = aligned + start % BLOCK_BYTES + shift;
                    let to = &mut memory[from..];
                    let (first, rest) = to.split_at_mut(cut);
                    let parts = [(first.as_mut_ptr(), cut), (rest[9..].as_mut_ptr(), end - start - cut)];
                    let parts =
                        parts.map(|(start, length)| libc::iovec { iov_base: start.cast(), iov_len: length });
                    // SAFETY: the parts are in `memory`, and do not overlap.
                    assert!(unsafe { reader.read(start as u64, &parts) }.expect("read"));
                    assert!(first == &bytes[start..start + cut], "{start}..{end}");
                    assert!(rest[9..9 + end - start - cut] == bytes[start + cut..end], "{start}..{end}");
                    assert_eq!((rest[8], rest[9 + end - start - cut]), (0xEE, 0xEE), "{start}..{end}");
                }
            }
        }
        let part = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: 100 };
        for offset in [bytes.len() - 3, 9 * BLOCK_BYTES + 1] {
            // SAFETY: as above.
            assert!(!unsafe { reader.read(offset as u64, &[part]) }.expect("read"), "the file ends early");
        }
        assert!(!speed.is_refused());
    }

    #[test]
    fn blocks_are_read_in_place_if_the_memory_has_them() {
        const B: u64 = BLOCK_BYTES as u64;
        assert_eq!(blocks_inside(7 * BLOCK_BYTES + 8, B + 8, 3 * BLOCK_BYTES), 2 * B..4 * B);
        assert_eq!(blocks_inside(7 * BLOCK_BYTES, B, BLOCK_BYTES), B..2 * B);
        assert!(blocks_inside(7 * BLOCK_BYTES + 72, B + 8, 3 * BLOCK_BYTES).is_empty(), "64 bytes further");
        assert!(blocks_inside(8, 8, 2 * BLOCK_BYTES - 9).is_empty(), "no whole block");
    }

    /// The time that the bytes of the trial take on the slowest fast storage.
    const TRIAL_TIME: Duration = Duration::from_nanos(TRIAL_BYTES * 1_000_000_000 / FAST_BYTES);

    #[test]
    fn slow_storage_is_recognized_after_a_trial() {
        for (time, is_fast) in [(TRIAL_TIME, true), (TRIAL_TIME * 101 / 100, false)] {
            let (mut progress, start) = (Progress::default(), Instant::now());
            // All of them wait for the last one, as in a queue.
            let bytes = |read| if read == 0 { TRIAL_BYTES - 31 } else { 1 };
            (0..32).for_each(|read| progress.begin(bytes(read), start + Duration::from_micros(read)));
            progress.end(TRIAL_BYTES - 31, start + time);
            assert!(progress.is_fast(start + time), "too few bytes");
            (0..31).for_each(|_| progress.end(1, start + time));
            assert_eq!(progress.is_fast(start + time), is_fast);
            progress.begin(TRIAL_BYTES, start + time);
            progress.end(TRIAL_BYTES, start + time + TRIAL_TIME / 2);
            assert!(progress.is_fast(start + time + TRIAL_TIME / 2), "the first reads were delayed");
        }
    }

    #[test]
    fn only_the_time_of_reads_counts() {
        let (mut progress, start) = (Progress::default(), Instant::now());
        progress.begin(TRIAL_BYTES, start);
        progress.end(TRIAL_BYTES, start + TRIAL_TIME);
        let later = start + Duration::from_secs(100);
        assert!(progress.is_fast(later), "nothing was read since");
        progress.begin(0, later);
        assert!(progress.is_fast(later));
        assert!(!progress.is_fast(later + TRIAL_TIME / 100), "a read that does not end");
    }

    #[test]
    fn reads_in_progress_count_by_half() {
        const READ_BYTES: u64 = TRIAL_BYTES / 4;
        let (mut progress, start) = (Progress::default(), Instant::now());
        (0..8).for_each(|_| progress.begin(READ_BYTES, start));
        // Four of eight are done, at 1.2 times the speed of fast storage.
        let now = start + TRIAL_TIME * 3 / 2 * 5 / 6;
        (0..4).for_each(|_| progress.end(READ_BYTES, now));
        assert!(progress.is_fast(now));
        assert!(!progress.is_fast(now + TRIAL_TIME / 2), "the others are slow");
    }

    #[test]
    fn the_variable_has_three_values() {
        let parsed = ["", "auto", "0", "1"].map(|text| parse(text.as_ref()).expect("valid"));
        assert_eq!(parsed, [Direct::Auto, Direct::Auto, Direct::Never, Direct::Always]);
        let error = parse("yes".as_ref()).expect_err("no such value");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("SAFETENSORS_TORCH_DIRECT: unknown value \"yes\""), "{error}");
    }
}
