//! Detects use after fork: a child process has none of our threads, and shares our file descriptions with its parent.

use crate::error::{Error, ErrorKind, Result};

/// The process that created an object, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerProcess(u32);

impl OwnerProcess {
    pub fn current() -> OwnerProcess {
        OwnerProcess(std::process::id())
    }

    #[cfg(test)]
    pub fn other() -> OwnerProcess {
        OwnerProcess(std::process::id() ^ 1)
    }

    /// Returns whether this is the current process, and not an ancestor of it.
    pub fn is_current(self) -> bool {
        self == OwnerProcess::current()
    }

    /// Checks that `object` ("save", "edit") is used by the process that created it.
    pub fn check(self, object: &str) -> Result<()> {
        if self.is_current() {
            return Ok(());
        }
        let detail =
            format!("this {object} was begun by process {}, before a fork; begin another one", self.0);
        Err(Error::new(ErrorKind::InvalidArgument, detail))
    }
}
