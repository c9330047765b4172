//! How many threads a call uses: no more than was set, those in the background among them. One test in a process of its
//! own, as the setting is the process's.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use safetensors_torch::{
    Backend, Dtype, Prefault, SaveOptions, TensorFile, TensorSpec, save_file, save_into, set_threads, threads,
};

const BYTES: usize = 96 << 20;

const SPEC: TensorSpec<'static> = TensorSpec { name: "bytes", dtype: Dtype::U8, shape: &[BYTES as u64] };

fn count() -> usize {
    fs::read_dir("/proc/self/task").expect("listed").count()
}

/// The most threads that this process has at a time while `work` runs, beside those that it has anyway.
fn most_threads(work: impl FnOnce()) -> usize {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let before = count() + 1;
        let over = &over;
        let watch = scope.spawn(move || {
            let mut most = 0;
            while !over.load(Ordering::Relaxed) {
                most = most.max(count());
            }
            most.saturating_sub(before)
        });
        work();
        over.store(true, Ordering::Relaxed);
        watch.join().expect("no panic")
    })
}

/// Waits until the threads in the background have ended.
fn settle(threads: usize) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while count() > threads {
        assert!(Instant::now() < deadline, "threads go on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// For each way of working, the most threads that it takes beside the calling one.
fn extra_threads(path: &Path, data: &[u8]) -> Vec<(&'static str, usize)> {
    let idle = count();
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
fn a_call_uses_no_more_threads_than_are_set() {
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
    let some = extra_threads(&path, &data);
    assert!(some.iter().all(|&(_, extra)| extra <= 2), "{some:?}");
    // Of how many there are, whatever the machine has: they read and copy at the same time.
    for what in ["load_tensors", "read_tensors", "save_into"] {
        assert!(some.iter().any(|&(name, extra)| name == what && extra == 2), "{what}: {some:?}");
    }
    set_threads(0);
    assert_eq!(threads().expect("set"), 0);
}
