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
use crate::sys::huge_pages::{HUGE_PAGE_BYTES, HugePage, is_resident};
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

/// A file for reads that bypass the page cache.
#[derive(Debug)]
pub(crate) struct DirectFile {
    file: File,
    /// Those that no thread uses: the next read of a thread uses one again.
    buffers: Mutex<Vec<HugePage>>,
}

impl DirectFile {
    /// Opens `file` again. Returns `None` if its filesystem has no direct reads.
    pub(crate) fn reopen(file: &File) -> Option<DirectFile> {
        let flags = libc::O_DIRECT | libc::O_NONBLOCK | libc::O_CLOEXEC;
        // The path would lead to another file after a rename.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
        Some(DirectFile { file, buffers: Mutex::default() })
    }
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

/// The most bytes of the blocks of one read that go through the buffer.
pub(crate) const BUFFER_BYTES: usize = HUGE_PAGE_BYTES;

/// The most bytes by which a part that is read in place increases that: the blocks at its ends, and the rest of the last block
/// before them.
pub(crate) const ENDS_BYTES: usize = 3 * BLOCK_BYTES;

/// Reads past the page cache. Blocks that lie in the memory of the caller as in the file can be read there; the others are
/// read into a buffer and copied.
///
/// A read that has one address for a huge page is faster than with one for each small page (docs/performance.md). So the buffer
/// is a huge page, and reads in place do not pay if the memory has small ones.
///
/// A fork during a read is harmless, although older kernels may give the child a page that the device still writes to: they
/// do that only if the parent writes to the page, and these pages contain nothing else.
#[derive(Debug)]
pub(crate) struct DirectReader<'a> {
    file: &'a DirectFile,
    speed: &'a StorageSpeed,
    buffer: Option<HugePage>,
    is_in_place: bool,
}

impl<'a> DirectReader<'a> {
    /// Returns a reader that uses a buffer for all bytes if not `is_in_place`.
    pub(crate) fn new(file: &'a DirectFile, speed: &'a StorageSpeed, is_in_place: bool) -> DirectReader<'a> {
        DirectReader { file, speed, buffer: None, is_in_place }
    }

    /// Returns whether blocks of the file from `offset` on are read directly into memory from `start` on.
    pub(crate) fn reads_in_place(&self, offset: u64, start: *mut u8) -> bool {
        self.is_in_place && start.addr() % BLOCK_BYTES == block_offset(offset)
    }

    /// Reads from `offset` on into `parts`, one after the other. Returns false if buffered reads are needed: the filesystem
    /// refuses, the file ends early, or the parts need a larger buffer, or more memory, than there is. The contents of the
    /// parts are then unspecified.
    ///
    /// # Safety
    ///
    /// Every part must be valid for writes of its length.
    pub(crate) unsafe fn read(&mut self, offset: u64, parts: &[libc::iovec]) -> io::Result<bool> {
        let length: usize = parts.iter().map(|part| part.iov_len).sum();
        let begin = offset - block_offset(offset) as u64;
        let Some(buffer) = self.buffer() else { return Ok(false) };
        let mut plan = Plan { buffer, begin, used: 0, pieces: Vec::new() };
        let mut copies = Vec::new();
        let mut at = offset;
        for part in parts {
            let (start, end): (*mut u8, u64) = (part.iov_base.cast(), at + part.iov_len as u64);
            let blocks = if self.reads_in_place(at, start) { whole_blocks(at..end) } else { end..end };
            let place = |offset: u64| start.wrapping_add((offset - at) as usize);
            if at < blocks.start {
                copies.push((plan.buffered(at), start, (blocks.start - at) as usize));
            }
            if blocks.start < blocks.end {
                plan.add_buffered(blocks.start);
                plan.add(place(blocks.start), blocks.end);
            }
            if blocks.end < end && blocks.start < blocks.end {
                copies.push((plan.buffered(blocks.end), place(blocks.end), (end - blocks.end) as usize));
            }
            at = end;
        }
        plan.add_buffered(at.next_multiple_of(BLOCK_BYTES as u64));
        let Plan { used, pieces, .. } = plan;
        if used > BUFFER_BYTES {
            return Ok(false);
        }
        for piece in &pieces {
            // SAFETY: as for the read below, which fills these bytes.
            unsafe { fault_in(piece.iov_base.cast(), piece.iov_len) };
        }
        let timer = self.speed.start(length);
        // SAFETY: the pieces are blocks of the parts, which are valid (this function's contract), and the first `used` bytes of
        // the buffer, which this reader alone uses and which has as many (checked).
        let read = unsafe { read_vectored_at(&self.file.file, &pieces, begin) };
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
        for (from, to, length) in copies {
            // SAFETY: `from` is in a piece of the buffer, which was read with the blocks around these bytes; `to` is in their part.
            unsafe { std::ptr::copy_nonoverlapping(from, to, length) };
        }
        Ok(true)
    }

    /// Returns the start of the buffer. `None` without enough memory for it.
    fn buffer(&mut self) -> Option<*mut u8> {
        if self.buffer.is_none() {
            let unused = self.file.buffers.lock().pop();
            self.buffer = unused.or_else(HugePage::new);
        }
        self.buffer.as_ref().map(HugePage::start)
    }
}

impl Drop for DirectReader<'_> {
    fn drop(&mut self) {
        self.file.buffers.lock().extend(self.buffer.take());
    }
}

/// Where each block of a read goes.
struct Plan {
    buffer: *mut u8,
    /// The offset in the file of the first block that has no piece yet.
    begin: u64,
    /// The bytes of the buffer that have a block. More than it has if they do not fit: such a plan is not carried out.
    used: usize,
    pieces: Vec<libc::iovec>,
}

impl Plan {
    /// Returns where the byte at `offset` of the file is in the buffer, if the blocks up to there go to it.
    fn buffered(&self, offset: u64) -> *mut u8 {
        self.buffer.wrapping_add(self.used + (offset - self.begin) as usize)
    }

    /// Adds a piece for the blocks up to `end`.
    fn add(&mut self, start: *mut u8, end: u64) {
        let length = (end - self.begin) as usize;
        if length > 0 {
            self.pieces.push(libc::iovec { iov_base: start.cast(), iov_len: length });
        }
        self.begin = end;
    }

    /// Adds a piece of the buffer for the blocks up to `end`.
    fn add_buffered(&mut self, end: u64) {
        let (start, length) = (self.buffered(self.begin), (end - self.begin) as usize);
        self.add(start, end);
        self.used += length;
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

/// Returns the whole blocks among `bytes` of a file; an empty range at their end if there is none.
fn whole_blocks(bytes: Range<u64>) -> Range<u64> {
    let block = BLOCK_BYTES as u64;
    let blocks = bytes.start.next_multiple_of(block)..bytes.end / block * block;
    if blocks.is_empty() { bytes.end..bytes.end } else { blocks }
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
        let Some(direct) = DirectFile::reopen(&file) else { return };
        let speed = StorageSpeed::default();
        let mut memory = vec![0u8; 2 * bytes.len() + 9 * BLOCK_BYTES];
        let aligned = memory.as_ptr().align_offset(BLOCK_BYTES);
        // Each part of equal length is in step with the file (0), or that many bytes further.
        for (is_in_place, shifts) in
            [(true, &[0][..]), (true, &[0, 9]), (true, &[0, 64, 0]), (true, &[64]), (false, &[0, 9, 0])]
        {
            for start in [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5] {
                for end in [start + 1, 3 * BLOCK_BYTES, bytes.len() - 1, bytes.len()] {
                    memory.fill(0xEE);
                    let mut reader = DirectReader::new(&direct, &speed, is_in_place);
                    let length = (end - start).div_ceil(shifts.len());
                    let (mut to, mut places) = (aligned, Vec::new());
                    for (number, shift) in shifts.iter().enumerate() {
                        let from = end.min(start + number * length)..end.min(start + (number + 1) * length);
                        to = to.next_multiple_of(BLOCK_BYTES) + from.start % BLOCK_BYTES + shift;
                        places.push((to, from.clone()));
                        to += from.len() + 1;
                    }
                    let base = memory.as_mut_ptr();
                    let parts: Vec<libc::iovec> = places
                        .iter()
                        .map(|(to, from)| libc::iovec {
                            iov_base: base.wrapping_add(*to).cast(),
                            iov_len: from.len(),
                        })
                        .collect();
                    // SAFETY: the parts are in `memory`, and do not overlap.
                    assert!(unsafe { reader.read(start as u64, &parts) }.expect("read"));
                    let mut expected = vec![0xEE; memory.len()];
                    for (to, from) in places {
                        expected[to..to + from.len()].copy_from_slice(&bytes[from]);
                    }
                    assert!(memory == expected, "{is_in_place} {shifts:?} {start}..{end}");
                }
            }
        }
        let mut reader = DirectReader::new(&direct, &speed, false);
        let part = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: 100 };
        for offset in [bytes.len() - 3, 9 * BLOCK_BYTES + 1] {
            // SAFETY: as above.
            assert!(!unsafe { reader.read(offset as u64, &[part]) }.expect("read"), "the file ends early");
        }
        // SAFETY: as above. No byte is read.
        let large = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: BUFFER_BYTES + 1 };
        assert!(!unsafe { reader.read(0, &[large]) }.expect("refused"), "the buffer is smaller");
        assert!(!speed.is_refused());
    }

    #[test]
    fn a_buffer_is_used_again() {
        let mut file = tempfile::tempfile_in(".").expect("a file");
        file.write_all(&[7; BLOCK_BYTES]).expect("written");
        let Some(direct) = DirectFile::reopen(&file) else { return };
        let speed = StorageSpeed::default();
        let read = || {
            let mut reader = DirectReader::new(&direct, &speed, false);
            let mut byte = [0u8];
            let part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
            // SAFETY: the part is the byte.
            assert!(unsafe { reader.read(3, &[part]) }.expect("read"));
            assert_eq!(byte, [7]);
            reader.buffer()
        };
        assert_eq!(read(), read());
        assert_eq!(direct.buffers.lock().len(), 1);
    }

    #[test]
    fn whole_blocks_are_inside() {
        const B: u64 = BLOCK_BYTES as u64;
        assert_eq!(whole_blocks(B + 8..4 * B + 8), 2 * B..4 * B);
        assert_eq!(whole_blocks(B..2 * B), B..2 * B);
        assert_eq!(whole_blocks(8..2 * B - 1), 2 * B - 1..2 * B - 1, "none");
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
