//! Targets that cannot be replaced: pipes, devices, and descriptors of the process. Bytes that were written to one cannot
//! be taken back.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{mapped, vectored};
use crate::error::{Error, Result};
use crate::sys::directory::Directory;
use crate::sys::fork::OwnerProcess;
use crate::sys::raw_bytes::{self, RawBytes};
use crate::sys::signals::block_write_signals;

/// The pause between two attempts to open a pipe without a reader.
const PAUSE: Duration = Duration::from_millis(10);

/// A pipe, a device or a descriptor that is written to.
#[derive(Debug)]
pub(crate) struct Direct {
    path: PathBuf,
    process: OwnerProcess,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Not open yet: a pipe may have no reader, and only the first write waits for one.
    Found { directory: Directory, name: OsString, entry: File },
    /// Open, without blocking for a pipe or a device.
    Open(File),
}

impl Direct {
    /// Returns the pipe or device `entry` (`O_PATH`) as a target.
    pub(crate) fn special(path: &Path, directory: Directory, name: OsString, entry: File) -> Direct {
        Direct::new(path, State::Found { directory, name, entry })
    }

    /// Returns an open descriptor of the process as a target. Writes begin at its position.
    pub(crate) fn descriptor(path: &Path, number: RawFd) -> Result<Direct> {
        // SAFETY: `fcntl` with F_DUPFD_CLOEXEC takes no pointer, and returns an error for a closed descriptor.
        let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 {
            return Err(Error::io("write", path, io::Error::last_os_error()));
        }
        // SAFETY: `from_raw_fd` requires an open descriptor that nothing else owns; the kernel has just created `copy`.
        let file = unsafe { File::from_raw_fd(copy) };
        mapped::refuse(&file, path)?;
        Ok(Direct::new(path, State::Open(file)))
    }

    fn new(path: &Path, state: State) -> Direct {
        Direct { path: path.to_path_buf(), process: OwnerProcess::current(), state }
    }

    /// Writes as much of `pieces` as the target accepts before `until`; returns the number of bytes.
    pub(crate) fn write<'a>(
        &mut self,
        pieces: impl Iterator<Item = RawBytes<'a>>,
        until: Option<Instant>,
    ) -> Result<u64> {
        self.check_process()?;
        let fail = |source| Error::io("write", &self.path, source);
        if let State::Found { directory, name, entry } = &self.state {
            let flags = libc::O_WRONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
            let is_pipe = entry.metadata().map_err(fail)?.file_type().is_fifo();
            let opened = loop {
                match directory.reopen(entry, name, flags) {
                    // The pipe has no reader yet.
                    Err(error) if is_pipe && error.raw_os_error() == Some(libc::ENXIO) => {}
                    opened => break opened.map_err(fail)?,
                }
                if until.is_some_and(|until| Instant::now() >= until) {
                    return Ok(0);
                }
                std::thread::sleep(PAUSE);
            };
            self.state = State::Open(opened);
        }
        let State::Open(file) = &self.state else { unreachable!("opened above") };
        let mut writer = PollingWriter { file, until, written: 0 };
        match block_write_signals(|| vectored::write_all(pieces, |pieces| writer.write(pieces))) {
            Err(error) if error.kind() != io::ErrorKind::TimedOut => Err(fail(error)),
            Ok(()) | Err(_) => Ok(writer.written),
        }
    }

    /// Synchronizes a descriptor of a file with `durable`; otherwise does nothing.
    pub(crate) fn commit(self, durable: bool) -> Result<()> {
        self.check_process()?;
        match self.state {
            State::Open(file) if durable => match file.sync_all() {
                // A pipe, or a device that keeps nothing.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EROFS)) => Ok(()),
                synchronized => synchronized.map_err(|source| Error::io("write", &self.path, source)),
            },
            _ => Ok(()),
        }
    }

    fn check_process(&self) -> Result<()> {
        self.process.check("save").map_err(|error| error.in_file(&self.path))
    }
}

/// A writer that waits while a pipe is full; `TimedOut` after `until`.
struct PollingWriter<'f> {
    file: &'f File,
    until: Option<Instant>,
    written: u64,
}

impl PollingWriter<'_> {
    fn write(&mut self, pieces: &[RawBytes<'_>]) -> io::Result<usize> {
        loop {
            match raw_bytes::write(self.file, pieces) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(count) => {
                    self.written += count as u64;
                    return Ok(count);
                }
                Err(error) => return Err(error),
            }
            if !wait_until_writable(self.file, self.until)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

/// Waits until `file` accepts bytes or has an error; returns `false` at `until`.
fn wait_until_writable(file: &File, until: Option<Instant>) -> io::Result<bool> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()).as_millis());
    let left = left.map_or(-1, |left| libc::c_int::try_from(left).unwrap_or(libc::c_int::MAX));
    let mut asked = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: `poll` requires as many `pollfd` as the count says: one.
    match unsafe { libc::poll(&raw mut asked, 1, left) } {
        0 => Ok(false),
        1.. => Ok(true),
        _ => match io::Error::last_os_error() {
            // Interrupted by a signal: the next write finds out.
            error if error.kind() == io::ErrorKind::Interrupted => Ok(left != 0),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, Read};
    use std::os::fd::OwnedFd;

    fn pipe() -> (PipeReader, Direct) {
        let (reader, writer) = io::pipe().expect("a pipe");
        let path = PathBuf::from(format!("/proc/self/fd/{}", writer.as_raw_fd()));
        let (directory, name) = Directory::open_parent(&path).expect("there");
        let entry = directory.open_link_target(&name).expect("looked at").expect("there");
        // The pipe stays open by what was looked at.
        drop(OwnedFd::from(writer));
        (reader, Direct::special(&path, directory, name, entry))
    }

    #[test]
    fn a_full_pipe_is_waited_for_until_the_time_is_up() {
        let (mut reader, mut direct) = pipe();
        let bytes = vec![7; 1 << 20];
        let begin = Instant::now();
        let written = direct
            .write([(&bytes[..]).into()].into_iter(), Some(begin + Duration::from_millis(50)))
            .expect("a part is written");
        assert!((1..1 << 20).contains(&written), "{written}");
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert_eq!(direct.write([(&bytes[..]).into()].into_iter(), Some(begin)).expect("full"), 0);
        let rest = &bytes[written as usize..];
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).expect("read");
            all
        });
        assert_eq!(direct.write([rest.into()].into_iter(), None).expect("written"), rest.len() as u64);
        direct.commit(true).expect("nothing to do");
        assert!(read.join().expect("no panic") == bytes);
    }

    #[test]
    fn a_pipe_without_a_reader_is_an_error_if_it_had_one() {
        let (reader, mut direct) = pipe();
        direct.write([(&[1u8][..]).into()].into_iter(), None).expect("written");
        drop(reader);
        let error = direct.write([(&[1u8][..]).into()].into_iter(), None).expect_err("no reader");
        assert_eq!(error.os_error(), Some(libc::EPIPE));
    }
}
