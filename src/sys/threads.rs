//! How many threads one call may use: a setting of the process.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// The variable that says it until it is set.
const VARIABLE: &str = "SAFETENSORS_TORCH_THREADS";

/// More threads than this find no more memory bandwidth.
const MOST_UNLESS_SET: usize = 8;

/// What was set; [`UNREAD`] until it was, and until the environment was asked.
static SET: AtomicUsize = AtomicUsize::new(UNREAD);

const UNREAD: usize = usize::MAX;

/// Sets the most threads that one call uses, from the next call on: the calling thread is one of them, and so are those
/// that go on in the background. With 0 it is as many as suit the machine and the work. For the whole process.
pub fn set_threads(most: usize) {
    SET.store(most.min(UNREAD - 1), Ordering::Relaxed);
}

/// What [`set_threads`] has set; before that, what the environment variable `SAFETENSORS_TORCH_THREADS` says, or 0.
///
/// # Errors
///
/// [`ErrorKind::InvalidArgument`] for a variable that is not a number.
pub fn threads() -> Result<usize> {
    match SET.load(Ordering::Relaxed) {
        UNREAD => {
            let most = env_number(VARIABLE, 0)?.min(UNREAD as u64 - 1) as usize;
            // Unless another thread was faster.
            Ok(SET
                .compare_exchange(UNREAD, most, Ordering::Relaxed, Ordering::Relaxed)
                .map_or_else(|set| set, |_| most))
        }
        most => Ok(most),
    }
}

/// The number that the environment variable `name` holds, or `otherwise` if it is not set, or empty.
///
/// # Errors
///
/// [`ErrorKind::InvalidArgument`] for a variable that is not a number: a setting without effect would be worse.
pub(crate) fn env_number(name: &str, otherwise: u64) -> Result<u64> {
    let Some(text) = std::env::var_os(name).filter(|text| !text.is_empty()) else { return Ok(otherwise) };
    text.to_str().and_then(|text| text.trim().parse().ok()).ok_or_else(|| {
        let detail =
            format!("the environment variable {name} is {text:?}: set it to a number from 0 on, or unset it");
        Error::new(ErrorKind::InvalidArgument, detail)
    })
}

/// The threads that a call may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadLimit {
    /// 0 for as many as suit.
    most: usize,
}

impl ThreadLimit {
    /// As the process has set it.
    ///
    /// # Errors
    ///
    /// As [`threads`].
    pub(crate) fn current() -> Result<ThreadLimit> {
        Ok(ThreadLimit { most: threads()? })
    }

    /// No more than `most`; with 0 as many as suit.
    pub(crate) fn at_most(most: usize) -> ThreadLimit {
        ThreadLimit { most }
    }

    /// The most that work is shared by, the calling thread among them.
    pub(crate) fn most(self) -> usize {
        match self.most {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(MOST_UNLESS_SET),
            most => most,
        }
    }

    /// `wanted`, or as many as may be used.
    pub(crate) fn cap(self, wanted: usize) -> usize {
        if self.most == 0 { wanted } else { wanted.min(self.most) }
    }

    /// As many as may be used beside the calling thread, of `wanted`.
    pub(crate) fn cap_background(self, wanted: usize) -> usize {
        if self.most == 0 { wanted } else { wanted.min(self.most - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cap_counts_the_calling_thread() {
        let (free, one, three) = (ThreadLimit::at_most(0), ThreadLimit::at_most(1), ThreadLimit::at_most(3));
        assert_eq!([free, one, three].map(|threads| threads.cap(4)), [4, 1, 3]);
        assert_eq!([free, one, three].map(|threads| threads.cap_background(4)), [4, 0, 2]);
        assert_eq!([free, one, three].map(|threads| threads.cap_background(1)), [1, 0, 1]);
        assert!((1..=MOST_UNLESS_SET).contains(&free.most()) && three.most() == 3);
    }

    #[test]
    fn a_variable_that_is_not_set_has_no_say() {
        assert_eq!(env_number("SAFETENSORS_TORCH_NO_SUCH_VARIABLE", 7).expect("unset"), 7);
        let error = env_number("PATH", 7).expect_err("not a number");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("the environment variable PATH is \""), "{error}");
    }
}
