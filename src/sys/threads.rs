//! The number of threads that a call may use: a setting of the process.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// The environment variable that applies until [`set_threads`] is called.
const VARIABLE: &str = "SAFETENSORS_TORCH_THREADS";

/// The default limit: more threads do not find more memory bandwidth.
const DEFAULT_LIMIT: usize = 8;

/// The limit, or [`UNREAD`] before it was set or read from the environment.
static LIMIT: AtomicUsize = AtomicUsize::new(UNREAD);

const UNREAD: usize = usize::MAX;

/// Sets how many threads a call may use, for the whole process and from the next call on. The calling thread and
/// background threads count. 0 selects a number that suits the machine and the work.
pub fn set_threads(limit: usize) {
    LIMIT.store(limit.min(UNREAD - 1), Ordering::Relaxed);
}

/// Returns the limit of [`set_threads`]; before the first call, the environment variable `SAFETENSORS_TORCH_THREADS`, or 0.
///
/// # Errors
///
/// [`ErrorKind::InvalidArgument`] if the variable is not a number.
pub fn threads() -> Result<usize> {
    match LIMIT.load(Ordering::Relaxed) {
        UNREAD => {
            let limit = env_number(VARIABLE, 0)?.min(UNREAD as u64 - 1) as usize;
            // A call of `set_threads` in the meantime takes precedence.
            Ok(LIMIT
                .compare_exchange(UNREAD, limit, Ordering::Relaxed, Ordering::Relaxed)
                .map_or_else(|set| set, |_| limit))
        }
        limit => Ok(limit),
    }
}

/// Returns the number in the environment variable `name`, or `default` if it is unset or empty. An error if it is not a
/// number, rather than ignoring a setting silently.
pub(crate) fn env_number(name: &str, default: u64) -> Result<u64> {
    let Some(text) = std::env::var_os(name).filter(|text| !text.is_empty()) else { return Ok(default) };
    text.to_str().and_then(|text| text.trim().parse().ok()).ok_or_else(|| {
        let detail = format!(
            "environment variable {name}: {text:?} is not a number; set it to 0 or more, or unset it"
        );
        Error::new(ErrorKind::InvalidArgument, detail)
    })
}

/// The number of threads that a call may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadLimit {
    /// 0 for a number that suits the machine and the work.
    limit: usize,
}

impl ThreadLimit {
    pub(crate) fn current() -> Result<ThreadLimit> {
        Ok(ThreadLimit { limit: threads()? })
    }

    /// Returns a limit of `limit` threads; 0 selects a number that suits the machine and the work.
    #[cfg(test)]
    pub(crate) fn at_most(limit: usize) -> ThreadLimit {
        ThreadLimit { limit }
    }

    /// Returns how many threads may share one job, including the calling one.
    pub(crate) fn max(self) -> usize {
        match self.limit {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(DEFAULT_LIMIT),
            limit => limit,
        }
    }

    /// Returns `wanted`, reduced to the limit.
    pub(crate) fn cap(self, wanted: usize) -> usize {
        if self.limit == 0 { wanted } else { wanted.min(self.limit) }
    }

    /// Returns `wanted`, reduced to the number of threads allowed beside the calling one.
    pub(crate) fn cap_background(self, wanted: usize) -> usize {
        if self.limit == 0 { wanted } else { wanted.min(self.limit - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_includes_the_calling_thread() {
        let (free, one, three) = (ThreadLimit::at_most(0), ThreadLimit::at_most(1), ThreadLimit::at_most(3));
        assert_eq!([free, one, three].map(|threads| threads.cap(4)), [4, 1, 3]);
        assert_eq!([free, one, three].map(|threads| threads.cap_background(4)), [4, 0, 2]);
        assert_eq!([free, one, three].map(|threads| threads.cap_background(1)), [1, 0, 1]);
        assert!((1..=DEFAULT_LIMIT).contains(&free.max()) && three.max() == 3);
    }

    #[test]
    fn an_environment_variable_must_be_a_number_if_it_is_set() {
        assert_eq!(env_number("SAFETENSORS_TORCH_NO_SUCH_VARIABLE", 7).expect("unset"), 7);
        let error = env_number("PATH", 7).expect_err("not a number");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("environment variable PATH: \""), "{error}");
    }
}
