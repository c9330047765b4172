//! Writes many pieces of memory with few system calls.

use std::io;

use crate::sys::raw_bytes::RawBytes;

/// The most pieces in one call (`IOV_MAX` of Linux).
const MAX_PIECES: usize = 1024;

/// Writes all of `pieces`, in order. `write` writes some bytes of its pieces, from the first on, and returns how many.
pub(crate) fn write_all<'a>(
    pieces: impl IntoIterator<Item = impl Into<RawBytes<'a>>>,
    mut write: impl FnMut(&[RawBytes<'a>]) -> io::Result<usize>,
) -> io::Result<()> {
    let mut pieces = pieces.into_iter().map(Into::into).filter(|piece| !piece.is_empty());
    let mut batch: Vec<RawBytes<'a>> = Vec::new();
    loop {
        batch.clear();
        batch.extend(pieces.by_ref().take(MAX_PIECES));
        if batch.is_empty() {
            return Ok(());
        }
        let mut rest = &mut batch[..];
        while !rest.is_empty() {
            match write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => rest = RawBytes::advance(rest, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::raw_bytes;
    use std::io::{Read, Seek};

    #[test]
    fn every_piece_is_written_in_order() {
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n % 253) as u8).collect();
        let mut file = tempfile::tempfile().expect("a file");
        let (small, large) = bytes.split_at(3 * MAX_PIECES + 5);
        let pieces = small.chunks(1).chain([&[][..]]).chain(large.chunks(100_003));
        write_all(pieces, |pieces| raw_bytes::write(&file, pieces)).expect("written");
        let mut written = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut written)).expect("read");
        assert!(written == bytes);
    }

    /// Takes what it likes of what it is given: at most so many bytes, after an interruption each time.
    struct Slow {
        taken: Vec<u8>,
        most: usize,
        interrupted: bool,
    }

    impl Slow {
        fn write(&mut self, pieces: &[RawBytes<'_>]) -> io::Result<usize> {
            self.interrupted = !self.interrupted;
            if self.interrupted {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let before = self.taken.len();
            // SAFETY: the pieces are slices of the test.
            let slices =
                pieces.iter().map(|piece| unsafe { std::slice::from_raw_parts(piece.as_ptr(), piece.len()) });
            self.taken.extend(slices.flatten().take(self.most));
            Ok(self.taken.len() - before)
        }
    }

    #[test]
    fn what_is_not_taken_at_once_is_offered_again() {
        let bytes: Vec<u8> = (0..10_000u32).map(|n| (n % 249) as u8).collect();
        for most in [1, 7, 100, 4999] {
            let mut slow = Slow { taken: Vec::new(), most, interrupted: false };
            write_all(bytes.chunks(37), |pieces| slow.write(pieces)).expect("written");
            assert!(slow.taken == bytes, "{most}");
        }
        let mut stuck = Slow { taken: Vec::new(), most: 0, interrupted: false };
        let error = write_all([&[1u8][..]], |pieces| stuck.write(pieces)).expect_err("nothing is taken");
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn a_full_device_is_an_error() {
        let file = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("open");
        let error = write_all([&[1u8][..]], |pieces| raw_bytes::write(&file, pieces)).expect_err("full");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
}
