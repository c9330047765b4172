//! Background threads that belong to one object and end with it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork::OwnerProcess;

/// The most threads of one object, whatever its caller asks for.
pub const MOST_THREADS: usize = 64;

/// The threads of one object. The object tells them to end before it drops this, which joins them.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
    /// The process that started the threads.
    process: OwnerProcess,
}

impl Workers {
    /// Starts `count` threads that call `work`; fewer, or none, if the system refuses them.
    pub fn start(count: usize, work: impl Fn() + Clone + Send + 'static) -> Workers {
        let start = |work| std::thread::Builder::new().name("safetensors".into()).spawn::<_, ()>(work).ok();
        let threads = (0..count).map_while(|_| start(work.clone())).collect();
        Workers { threads, process: OwnerProcess::current() }
    }

    /// Returns whether there are no threads: then the object's caller does the work.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Returns whether a parent process started the object. A thread that does not exist here may then hold its lock.
    pub fn are_forked(&self) -> bool {
        !self.process.is_current()
    }

    /// Checks that this process started the object, with or without threads: their number depends on the machine. `object` is
    /// for the error, as in [`OwnerProcess::check`].
    pub fn check(&self, object: &str) -> Result<()> {
        self.process.check(object)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if self.are_forked() {
            // The threads do not exist in this process: they can be neither joined nor freed.
            self.threads.drain(..).for_each(std::mem::forget);
        }
        for thread in self.threads.drain(..) {
            // `catch_panic` has caught every panic.
            let _ = thread.join();
        }
    }
}

/// Returns the result of `read`; a panic becomes an error, so that the other threads can end.
pub fn catch_panic(read: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Panic, "a thread that reads panicked: this is a bug in this library"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    #[cfg_attr(tsan, ignore = "ThreadSanitizer reports threads that are not joined")]
    fn the_threads_of_a_parent_process_are_not_joined() {
        let (end, ended) = mpsc::channel::<()>();
        let ended = std::sync::Arc::new(std::sync::Mutex::new(ended));
        let work = move || {
            ended.lock().expect("one thread").recv().expect_err("nothing is sent");
        };
        for count in [0, 1] {
            let mut workers = Workers::start(count, work.clone());
            assert_eq!(workers.is_empty(), count == 0);
            workers.check("load").expect("this process started them");
            workers.process = OwnerProcess::other();
            assert!(workers.are_forked());
            let error = workers.check("load").expect_err("begun elsewhere").to_string();
            assert!(error.contains("this load was begun by process"), "{error}");
            drop(workers); // would wait forever
        }
        drop(end);
    }

    #[test]
    fn a_panic_becomes_an_error() {
        let error = catch_panic(|| panic!("no")).expect_err("caught");
        assert_eq!(error.kind(), ErrorKind::Panic);
    }
}
