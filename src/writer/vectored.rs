//! Writes many pieces of memory with few system calls.

use std::fs::File;
use std::io::{self, IoSlice, Write};

/// The most pieces in one call: what Linux allows.
const MAX_PIECES: usize = 1024;

/// Writes every byte of `pieces` to `file`, in their order.
pub(super) fn write_all<'a>(file: &mut File, pieces: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
    let mut pieces = pieces.into_iter().filter(|piece| !piece.is_empty());
    let mut batch: Vec<IoSlice<'a>> = Vec::new();
    loop {
        batch.clear();
        batch.extend(pieces.by_ref().take(MAX_PIECES).map(IoSlice::new));
        if batch.is_empty() {
            return Ok(());
        }
        let mut rest = &mut batch[..];
        while !rest.is_empty() {
            match file.write_vectored(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => IoSlice::advance_slices(&mut rest, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn every_piece_is_written_in_order() {
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n % 253) as u8).collect();
        let mut file = tempfile::tempfile().expect("a file");
        let (small, large) = bytes.split_at(3 * MAX_PIECES + 5);
        let pieces = small.chunks(1).chain([&[][..]]).chain(large.chunks(100_003));
        write_all(&mut file, pieces).expect("written");
        let mut written = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut written)).expect("read");
        assert!(written == bytes);
    }

    #[test]
    fn a_pipe_that_takes_little_at_a_time_gets_everything() {
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let bytes = vec![9; 1 << 20];
        let expected = bytes.clone();
        let thread = std::thread::spawn(move || {
            let mut file = File::from(std::os::fd::OwnedFd::from(writer));
            write_all(&mut file, bytes.chunks(70_001))
        });
        let mut read = Vec::new();
        reader.read_to_end(&mut read).expect("read");
        thread.join().expect("no panic").expect("written");
        assert!(read == expected);
    }

    #[test]
    fn a_full_device_is_an_error() {
        let mut file = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("open");
        let error = write_all(&mut file, [&[1u8][..]]).expect_err("full");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
}
