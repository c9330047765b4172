//! Dropping a loader half-way leaves no thread and no memory. The program has only this test, because it counts both.

mod common;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use safetensors_torch::{
    Backend, NextTensor, PrefetchLoader, PrefetchOptions, PrefetchRequest, PrefetchedTensor, TensorFile,
};

/// Far longer than any read here takes.
const LONG: Duration = Duration::from_secs(60);

const BYTES: usize = 256 << 20;

/// Returns the number of threads of this process.
fn threads() -> usize {
    fs::read_dir("/proc/self/task").expect("listed").count()
}

/// Returns the anonymous memory of this process in KiB.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("listed");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("known");
    line.split_whitespace().nth(1).and_then(|kibibytes| kibibytes.parse().ok()).expect("a number")
}

fn start(file: &Arc<TensorFile>) -> PrefetchLoader {
    let requests = (0..4).map(|_| PrefetchRequest {
        file: Arc::clone(file),
        index: 0,
        slice: None,
        destination: None,
        extra_bytes: 0,
    });
    let options = PrefetchOptions { threads: Some(3), ..PrefetchOptions::default() };
    // SAFETY: no request has a destination.
    unsafe { PrefetchLoader::new(requests.collect(), options) }.expect("valid")
}

fn first(loader: &PrefetchLoader) -> PrefetchedTensor {
    match loader.next(LONG).expect("read") {
        NextTensor::Ready(tensor) => tensor,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dropped_loader_leaves_no_thread_and_no_memory() {
    let directory = common::directory();
    let path = directory.path().join("model.safetensors");
    common::save(&path, &vec![7; BYTES]).expect("saved");
    let file = Arc::new(TensorFile::open(&path, Backend::Pread).expect("valid"));
    let kept = first(&start(&file));
    // SAFETY: `owner` keeps the bytes allocated, although the loader is gone.
    let bytes = unsafe { std::slice::from_raw_parts(kept.start, BYTES) };
    assert!(kept.owner.is_some() && bytes.iter().all(|&byte| byte == 7));
    drop(kept);
    let (before, idle) = (resident(), threads());
    for taken in 0..3 {
        let loader = start(&file);
        assert!(threads() > idle);
        for _ in 0..taken {
            first(&loader);
        }
        drop(loader);
        assert!(resident() < before + (16 << 10), "{} KiB more after {taken}", resident() - before);
        // A joined thread may be listed a little longer.
        let deadline = Instant::now() + LONG;
        while threads() > idle {
            assert!(Instant::now() < deadline, "{} threads are left", threads() - idle);
        }
    }
}
