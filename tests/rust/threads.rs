//! The limit on threads also holds for background threads. The setting is global, so this program has only one test.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use safetensors_torch::{
    Backend, Dtype, Prefault, SaveOptions, TensorFile, TensorSpec, save_file, save_into, set_threads, threads,
};

const BYTES: usize = 96 << 20;

const SPEC: TensorSpec<'static> = TensorSpec { name: "bytes", dtype: Dtype::U8, shape: &[BYTES as u64] };

fn thread_count() -> usize {
    fs::read_dir("/proc/self/task").expect("listed").count()
}

/// Returns the largest number of additional threads in this process while `work` runs.
fn most_threads(work: impl FnOnce()) -> usize {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let before = thread_count() + 1;
        let done = &done;
        let watch = scope.spawn(move || {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(thread_count());
            }
            most.saturating_sub(before)
        });
        work();
        done.store(true, Ordering::Relaxed);
        watch.join().expect("no panic")
    })
}

/// Waits until background threads have ended.
fn settle(threads: usize) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while thread_count() > threads {
        assert!(Instant::now() < deadline, "threads have not ended");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns, for each kind of call, the largest number of threads that it uses beside the calling one.
fn extra_threads(path: &Path, data: &[u8]) -> Vec<(&'static str, usize)> {
    let idle = thread_count();
    let mut target = vec![0; BYTES + 4096];
    let mut found = Vec::new();
    let mut watch = |what, work: &mut dyn FnMut()| {
        found.push((what, most_threads(work)));
        settle(idle);
    };
    for backend in [Backend::Pread, Backend::Mmap] {
        let file = TensorFile::open(path, backend).expect("opened");
        watch("load_tensors", &mut || drop(file.load_tensors(&[0]).expect("read")));
        let buffer = target.as_mut_ptr();
        // SAFETY: the buffer has more bytes than the tensor.
        watch("read_tensors", &mut || unsafe { file.read_tensors(&[(0, buffer, BYTES)]) }.expect("read"));
    }
    for when in [Prefault::Wait, Prefault::Background] {
        watch("prefault", &mut || {
            let file = TensorFile::open(path, Backend::Mmap).expect("opened");
            file.prefault(when).expect("brought in");
            settle(idle + 1);
        });
    }
    let size = fs::metadata(path).expect("there").len() as usize;
    watch("save_into", &mut || {
        save_into(&[SPEC], &[data], None, &mut target[..size], 8).expect("written");
    });
    watch("save_file", &mut || {
        save_file(&[SPEC], &[data], None, path, SaveOptions::default()).expect("written");
    });
    found
}

#[test]
fn calls_respect_the_limit_on_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("file");
    let data = vec![7; BYTES];
    save_file(&[SPEC], &[&data], None, &path, SaveOptions::default()).expect("written");

    assert_eq!(threads().expect("not set"), 0);
    set_threads(1);
    assert_eq!(threads().expect("set"), 1);
    for (what, extra) in extra_threads(&path, &data) {
        assert_eq!(extra, 0, "{what}");
    }
    set_threads(3);
    // Reads and copies use all threads, independent of the number of processors. On a busy machine a thread may have
    // ended before another begins.
    let mut missing = vec!["load_tensors", "read_tensors", "save_into"];
    for _ in 0..10 {
        let some = extra_threads(&path, &data);
        assert!(some.iter().all(|&(_, extra)| extra <= 2), "{some:?}");
        missing.retain(|&what| !some.contains(&(what, 2)));
        if missing.is_empty() {
            break;
        }
    }
    assert!(missing.is_empty(), "these never used all threads: {missing:?}");
    set_threads(0);
    assert_eq!(threads().expect("set"), 0);
}
