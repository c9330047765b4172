//! The process that something was begun in: one that is forked meanwhile has a copy of it, but none of its threads, and
//! shares what the kernel keeps of its files.

use crate::error::{Error, ErrorKind, Result};

/// A process, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerProcess(u32);

impl OwnerProcess {
    /// The one that this runs in.
    pub fn current() -> OwnerProcess {
        OwnerProcess(std::process::id())
    }

    /// Another one.
    #[cfg(test)]
    pub fn other() -> OwnerProcess {
        OwnerProcess(std::process::id() ^ 1)
    }

    /// Whether this runs in it, and in none that was forked from it.
    pub fn is_current(self) -> bool {
        self == OwnerProcess::current()
    }

    /// Refuses to go on with `what` in another process.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`].
    pub fn check(self, what: &str) -> Result<()> {
        if self.is_current() {
            return Ok(());
        }
        let detail = format!("this {what} was begun by process {}, before a fork: begin another one", self.0);
        Err(Error::new(ErrorKind::InvalidArgument, detail))
    }
}
