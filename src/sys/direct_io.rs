//! Reads that bypass the page cache (`O_DIRECT`): the setting of the process, and the reads.
//!
//! The device writes to a buffer whose address, like the offset in the file, is a multiple of its block size. The bytes are
//! copied from there: tensors begin at any offset, and the buffer is still in the processor's caches.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// The environment variable that applies until [`set_direct`] is called.
const VARIABLE: &str = "SAFETENSORS_TORCH_DIRECT";

/// A multiple of the block size of every common device.
const BLOCK_BYTES: usize = 4096;

/// Whether reads into memory bypass the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Direct {
    /// If the file is not in the page cache, and its storage is fast ([`DirectSpeed`]).
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

/// The bytes of a file that are read directly before the speed counts.
const TRIAL_BYTES: u64 = 32 << 20;

/// Storage that gives at least as many bytes in a second is fast.
const FAST_BYTES: u64 = 1 << 30;

/// How fast direct reads of a file were. The page cache costs slow storage no time, and the next load of the file, or another
/// process, finds it there. Several processes that read from one disk have slow storage too.
#[derive(Debug, Default)]
pub(crate) struct DirectSpeed {
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

impl DirectSpeed {
    /// Counts a read of `bytes` that took `time`.
    pub(crate) fn count(&self, bytes: usize, time: Duration) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.nanoseconds.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Returns whether `readers` threads together read fast, or whether that is not known yet.
    pub(crate) fn is_fast(&self, readers: usize) -> bool {
        let bytes = self.bytes.load(Ordering::Relaxed);
        let nanoseconds = u128::from(self.nanoseconds.load(Ordering::Relaxed));
        bytes < TRIAL_BYTES
            || u128::from(bytes) * readers as u128 * 1_000_000_000 >= u128::from(FAST_BYTES) * nanoseconds
    }
}

/// Memory that a device can write to, from its first multiple of [`BLOCK_BYTES`] on.
#[derive(Debug, Default)]
pub(crate) struct BounceBuffer(Vec<u8>);

impl BounceBuffer {
    /// Reads `length` bytes at `offset` of `file`, which [`reopen`] returned. Returns fewer at the end of the file.
    pub(crate) fn read(&mut self, file: &File, offset: u64, length: usize) -> io::Result<&[u8]> {
        let skipped = block_offset(offset);
        let whole = (skipped + length).next_multiple_of(BLOCK_BYTES);
        if self.0.len() < whole + BLOCK_BYTES {
            self.0.resize(whole + BLOCK_BYTES, 0);
        }
        let unaligned = self.0.as_ptr().align_offset(BLOCK_BYTES);
        let buffer = &mut self.0[unaligned..unaligned + whole];
        let mut filled = 0;
        // A read that ends inside a block has reached the end of the file.
        while filled < skipped + length && filled.is_multiple_of(BLOCK_BYTES) {
            match file.read_at(&mut buffer[filled..], offset - skipped as u64 + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(&buffer[skipped.min(filled)..filled.min(skipped + length)])
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
    fn reads_any_range() {
        let bytes: Vec<u8> = (0..5 * BLOCK_BYTES + 77).map(|i| (i / 7) as u8).collect();
        let mut file = tempfile::tempfile_in(".").expect("a file");
        file.write_all(&bytes).expect("written");
        let Some(direct) = reopen(&file) else { return };
        let mut buffer = BounceBuffer::default();
        for start in [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5] {
            for end in [start + 1, 3 * BLOCK_BYTES, bytes.len() - 1, bytes.len()] {
                let read = buffer.read(&direct, start as u64, end - start).expect("read");
                assert!(read == &bytes[start..end], "{start}..{end}");
            }
        }
        let end = buffer.read(&direct, bytes.len() as u64 - 3, 100).expect("read");
        assert_eq!(end, &bytes[bytes.len() - 3..]);
        assert!(buffer.read(&direct, 9 * BLOCK_BYTES as u64 + 1, 100).expect("read").is_empty());
    }

    #[test]
    fn slow_storage_is_recognized_after_a_trial() {
        let speed = DirectSpeed::default();
        speed.count(TRIAL_BYTES as usize - 1, Duration::from_secs(100));
        assert!(speed.is_fast(1), "too few bytes");
        speed.count(1, Duration::ZERO);
        assert!(!speed.is_fast(16));
        let speed = DirectSpeed::default();
        speed.count(FAST_BYTES as usize, Duration::from_millis(3_999));
        assert!(speed.is_fast(4) && !speed.is_fast(3));
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
