//! Targets that nothing can be renamed over: pipes, devices, and descriptors of the process. Their bytes go where those of
//! every other program go, and what was written cannot be taken back.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{mapped, vectored};
use crate::error::{Error, Result};
use crate::sys::directory::Directory;
use crate::sys::fork::OwnerProcess;
use crate::sys::signals::block_write_signals;

/// How long to wait until a pipe without a reader is tried again.
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
    /// Not open yet: a pipe may have no reader, and nobody is to wait for one before the first write.
    Found { directory: Directory, name: OsString, entry: File },
    /// Open. Writes to a pipe or a device do not wait.
    Open(File),
}

impl Direct {
    /// For the pipe or the device that was looked at as `entry`.
    pub(crate) fn special(path: &Path, directory: Directory, name: OsString, entry: File) -> Direct {
        Direct::new(path, State::Found { directory, name, entry })
    }

    /// For a file that the process has open: the bytes go to where the descriptor stands.
    pub(crate) fn descriptor(path: &Path, number: RawFd) -> Result<Direct> {
        // SAFETY: a call without pointers; the descriptor may be closed by now, which it says.
        let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 {
            return Err(Error::io("write", path, io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made this descriptor, and nothing else has it.
        let file = unsafe { File::from_raw_fd(copy) };
        mapped::refuse(&file, path)?;
        Ok(Direct::new(path, State::Open(file)))
    }

    fn new(path: &Path, state: State) -> Direct {
        Direct { path: path.to_path_buf(), process: OwnerProcess::current(), state }
    }

    /// Writes what of `pieces` is taken before `until`, from their start on; returns how many bytes.
    pub(crate) fn write<'a>(
        &mut self,
        pieces: impl Iterator<Item = &'a [u8]>,
        until: Option<Instant>,
    ) -> Result<u64> {
        self.check_process()?;
        let fail = |source| Error::io("write", &self.path, source);
        if let State::Found { directory, name, entry } = &self.state {
            let flags = libc::O_WRONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
            let is_pipe = entry.metadata().map_err(fail)?.file_type().is_fifo();
            let opened = loop {
                match directory.reopen(entry, name, flags) {
                    // It has no reader yet.
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
        let mut patient = Patient { file, until, written: 0 };
        match block_write_signals(|| vectored::write_all(&mut patient, pieces)) {
            Err(error) if error.kind() != io::ErrorKind::TimedOut => Err(fail(error)),
            Ok(()) | Err(_) => Ok(patient.written),
        }
    }

    /// Nothing is left to do but to have the bytes put on the disk, with `durable`, if they are those of a file.
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

/// Waits where a pipe takes nothing more, but not beyond a moment: `TimedOut` is that then.
struct Patient<'f> {
    file: &'f File,
    until: Option<Instant>,
    written: u64,
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            match self.file.write_vectored(pieces) {
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

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether `file` takes bytes, or has an error to tell, before `until`.
fn wait_until_writable(file: &File, until: Option<Instant>) -> io::Result<bool> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()).as_millis());
    let left = left.map_or(-1, |left| libc::c_int::try_from(left).unwrap_or(libc::c_int::MAX));
    let mut asked = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one description of a descriptor that `file` keeps open.
    match unsafe { libc::poll(&raw mut asked, 1, left) } {
        0 => Ok(false),
        1.. => Ok(true),
        _ => match io::Error::last_os_error() {
            // A signal: the next write says whether it takes bytes.
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
            .write([&bytes[..]].into_iter(), Some(begin + Duration::from_millis(50)))
            .expect("a part is written");
        assert!((1..1 << 20).contains(&written), "{written}");
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert_eq!(direct.write([&bytes[..]].into_iter(), Some(begin)).expect("full"), 0);
        let rest = &bytes[written as usize..];
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).expect("read");
            all
        });
        assert_eq!(direct.write([rest].into_iter(), None).expect("written"), rest.len() as u64);
        direct.commit(true).expect("nothing to do");
        assert!(read.join().expect("no panic") == bytes);
    }

    #[test]
    fn a_pipe_without_a_reader_is_an_error_if_it_had_one() {
        let (reader, mut direct) = pipe();
        direct.write([&[1u8][..]].into_iter(), None).expect("written");
        drop(reader);
        let error = direct.write([&[1u8][..]].into_iter(), None).expect_err("no reader");
        assert_eq!(error.os_error(), Some(libc::EPIPE));
    }
}
