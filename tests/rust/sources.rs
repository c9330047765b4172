//! Files that a program reads by its own means.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use safetensors_torch::{
    AxisRange, Backend, ByteSource, Destination, Dtype, Error, ErrorKind, NextTensor, PrefetchLoader,
    PrefetchOptions, PrefetchRequest, Result, SaveOptions, TensorFile, TensorSpec, save_file,
};

const NAME: &str = "s3://bucket/model.safetensors";

/// A bucket with one object. Counts requests.
#[derive(Debug, Default)]
struct Bucket {
    object: Mutex<Vec<u8>>,
    etag: AtomicUsize,
    requests: Mutex<Vec<(u64, usize)>>,
    most_at_once: AtomicUsize,
    at_once: AtomicUsize,
    latency: Duration,
    is_short: AtomicBool,
    is_broken: AtomicBool,
    max_requests: Option<usize>,
}

#[derive(Debug)]
struct Object(Arc<Bucket>);

impl ByteSource for Object {
    fn length(&self) -> Result<u64> {
        Ok(self.0.object.lock().expect("not poisoned").len() as u64)
    }

    fn identity(&self) -> Result<Option<String>> {
        Ok(Some(self.0.etag.load(Ordering::SeqCst).to_string()))
    }

    fn max_requests(&self) -> Option<usize> {
        self.0.max_requests
    }

    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<()> {
        let Bucket { object, requests, most_at_once, at_once, .. } = &*self.0;
        most_at_once.fetch_max(1 + at_once.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
        std::thread::sleep(self.0.latency);
        at_once.fetch_sub(1, Ordering::SeqCst);
        requests.lock().expect("not poisoned").push((offset, destination.remaining()));
        if self.0.is_broken.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Io, "503: try again later"));
        }
        let object = object.lock().expect("not poisoned");
        let bytes = &object[offset as usize..offset as usize + destination.remaining()];
        // As a client gets them: in parts.
        let bytes = if self.0.is_short.load(Ordering::SeqCst) { &bytes[1..] } else { bytes };
        bytes.chunks(100_001).for_each(|part| destination.write(part));
        Ok(())
    }
}

impl Bucket {
    fn requests(&self) -> Vec<(u64, usize)> {
        std::mem::take(&mut self.requests.lock().expect("not poisoned"))
    }
}

/// Returns a bucket with tensors `t0`, `t1`, ... of these sizes, and the same bytes as a file.
fn bucket(sizes: &[usize], latency: Duration) -> (Arc<Bucket>, tempfile::TempDir, TensorFile) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("model.safetensors");
    let names: Vec<String> = (0..sizes.len()).map(|number| format!("t{number}")).collect();
    let shapes: Vec<[u64; 1]> = sizes.iter().map(|&size| [size as u64]).collect();
    let specs: Vec<TensorSpec<'_>> =
        names.iter().zip(&shapes).map(|(name, shape)| TensorSpec { name, dtype: Dtype::U8, shape }).collect();
    let data: Vec<Vec<u8>> =
        sizes.iter().enumerate().map(|(n, &size)| (0..size).map(|i| (i / 5 + n) as u8).collect()).collect();
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    save_file(&specs, &slices, None, &path, SaveOptions::default()).expect("saved");
    let object = Mutex::new(std::fs::read(&path).expect("read"));
    let bucket = Arc::new(Bucket { object, latency, ..Bucket::default() });
    let file = TensorFile::open(&path, Backend::Pread).expect("opened");
    (bucket, directory, file)
}

fn open(bucket: &Arc<Bucket>) -> Result<TensorFile> {
    TensorFile::from_source(Box::new(Object(Arc::clone(bucket))), NAME.as_ref())
}

fn bytes_of(file: &TensorFile, indices: &[usize]) -> Result<Vec<Vec<u8>>> {
    let buffers = file.load_tensors(indices)?;
    let sizes = indices.iter().map(|&index| file.tensor(index).expect("a tensor").nbytes() as usize);
    let read = sizes.enumerate().map(|(place, size)| {
        // SAFETY: `buffers` has `size` bytes for this tensor, which the load has written.
        unsafe { std::slice::from_raw_parts(buffers.start(place), size) }.to_vec()
    });
    Ok(read.collect())
}

#[test]
fn tensors_are_those_of_the_file() {
    let (bucket, _directory, file) = bucket(&[3, 0, 30_000_001, 77, 9_000_000], Duration::from_millis(50));
    let source = open(&bucket).expect("opened");
    assert_eq!(bucket.requests(), [(0, 1 << 20)], "the header takes one request");
    let all: Vec<usize> = (0..5).collect();
    assert_eq!(bytes_of(&source, &all).expect("read"), bytes_of(&file, &all).expect("read"));
    let requests = bucket.requests();
    assert!(requests.iter().all(|&(_, bytes)| bytes <= 8 << 20), "{requests:?}");
    let read: usize = requests.iter().map(|&(_, bytes)| bytes).sum();
    assert!((39_000_081..39_100_000).contains(&read), "{read}");
    assert!(bucket.most_at_once.load(Ordering::SeqCst) >= 4, "requests overlap");
    // One tensor takes its bytes and no others.
    bytes_of(&source, &[source.require("t4").expect("there")]).expect("read");
    assert_eq!(bucket.requests().iter().map(|&(_, bytes)| bytes).sum::<usize>(), 9_000_000);
}

#[test]
fn a_small_file_takes_one_request() {
    let (bucket, _directory, file) = bucket(&[3, 700], Duration::ZERO);
    let source = open(&bucket).expect("opened");
    assert_eq!(bytes_of(&source, &[0, 1]).expect("read"), bytes_of(&file, &[0, 1]).expect("read"));
    assert_eq!(bucket.requests().len(), 1);
}

#[test]
fn a_header_of_several_mebibytes_takes_two_requests() {
    let (bucket, _directory, file) = bucket(&vec![1; 50_000], Duration::ZERO);
    assert!(file.header().data_start() > 2 << 20);
    open(&bucket).expect("opened");
    let requests = bucket.requests();
    assert_eq!(requests.len(), 2, "{requests:?}");
}

#[test]
fn small_gaps_are_read_with_their_neighbours() {
    let (bucket, _directory, file) = bucket(&[50_000; 30], Duration::ZERO);
    let source = open(&bucket).expect("opened");
    bucket.requests();
    let even: Vec<usize> = (0..30).step_by(2).collect();
    assert_eq!(bytes_of(&source, &even).expect("read"), bytes_of(&file, &even).expect("read"));
    assert_eq!(bucket.requests().len(), 1);
    let far = [0, 29];
    assert_eq!(bytes_of(&source, &far).expect("read"), bytes_of(&file, &far).expect("read"));
    assert_eq!(bucket.requests().len(), 2);
}

#[test]
fn slices_and_prefetches_are_those_of_the_file() {
    let (bucket, _directory, file) = bucket(&[5_000_000, 3_000_000], Duration::ZERO);
    let (source, file) = (Arc::new(open(&bucket).expect("opened")), Arc::new(file));
    for range in [
        AxisRange { start: 7, stop: 4_000_000, step: 1 },
        AxisRange { start: 3, stop: 2_000_000, step: 1000 },
    ] {
        let read = |file: &TensorFile| {
            let slice = file.slice(0, &[range]).expect("inside");
            let mut bytes = vec![0; slice.nbytes() as usize];
            // SAFETY: the buffer is valid for writes of its length.
            unsafe { file.read_slice(0, &slice, bytes.as_mut_ptr(), bytes.len()) }.expect("read");
            bytes
        };
        assert_eq!(read(&source), read(&file), "{range:?}");
    }
    let request = |file: &Arc<TensorFile>, index| PrefetchRequest {
        file: Arc::clone(file),
        index,
        slice: None,
        destination: None,
        extra_bytes: 0,
    };
    let prefetched = |file: &Arc<TensorFile>| {
        let requests = vec![request(file, 0), request(file, 1)];
        // SAFETY: the requests have no destinations.
        let loader = unsafe { PrefetchLoader::new(requests, PrefetchOptions::default()) }.expect("begun");
        let mut found = vec![Vec::new(); 2];
        loop {
            match loader.next(Duration::from_secs(60)).expect("read") {
                NextTensor::Ready(tensor) => {
                    let bytes = file.tensor(tensor.request).expect("a tensor").nbytes() as usize;
                    // SAFETY: the loader has read the tensor there, and `tensor.owner` keeps it.
                    found[tensor.request] =
                        unsafe { std::slice::from_raw_parts(tensor.start, bytes) }.to_vec();
                }
                NextTensor::NotReady => {}
                NextTensor::End => return found,
            }
        }
    };
    assert_eq!(prefetched(&source), prefetched(&file));
}

#[test]
fn errors_name_the_source() {
    let (bucket, _directory, _) = bucket(&[3, 20_000_000], Duration::ZERO);
    let source = open(&bucket).expect("opened");
    let fail = |kind: ErrorKind, texts: &[&str]| {
        let error = bytes_of(&source, &[0, 1]).expect_err("a fault");
        assert_eq!(error.kind(), kind, "{error}");
        for text in [NAME].iter().chain(texts) {
            assert!(error.to_string().contains(text), "{error}: {text}");
        }
        assert_eq!(error.to_string().matches(NAME).count(), 1, "{error}");
    };
    bucket.is_broken.store(true, Ordering::SeqCst);
    fail(ErrorKind::Io, &["503: try again later", "the bytes were for tensor \"t"]);
    open(&bucket).expect_err("the header cannot be read");
    bucket.is_broken.store(false, Ordering::SeqCst);
    bucket.is_short.store(true, Ordering::SeqCst);
    fail(ErrorKind::Io, &["bytes at offset"]);
    bucket.is_short.store(false, Ordering::SeqCst);
    bytes_of(&source, &[0, 1]).expect("read again");
    bucket.etag.store(7, Ordering::SeqCst);
    fail(ErrorKind::FileChanged, &["was replaced while it was read"]);
    bucket.object.lock().expect("not poisoned")[7] = 255;
    let error = open(&bucket).expect_err("invalid");
    assert_eq!(error.kind(), ErrorKind::HeaderTooLarge, "{error}");
    bucket.object.lock().expect("not poisoned").clear();
    assert_eq!(open(&bucket).expect_err("empty").kind(), ErrorKind::FileTooSmall);
}

#[test]
fn a_source_may_answer_one_request_at_a_time() {
    let (bucket, _directory, file) = bucket(&[20_000_000, 30_000_001, 9_000_000], Duration::from_millis(5));
    let bucket = Arc::new(Bucket { max_requests: Some(1), ..Arc::into_inner(bucket).expect("one owner") });
    let source = open(&bucket).expect("opened");
    bucket.requests();
    assert_eq!(bytes_of(&source, &[0, 1, 2]).expect("read"), bytes_of(&file, &[0, 1, 2]).expect("read"));
    assert_eq!(bucket.most_at_once.load(Ordering::SeqCst), 1);
    assert!(bucket.requests().is_sorted(), "in the order of the file");
    let shared = Arc::new(source);
    let requests = (0..3).map(|index| {
        let file = Arc::clone(&shared);
        PrefetchRequest { file, index, slice: None, destination: None, extra_bytes: 0 }
    });
    bucket.requests();
    // SAFETY: the requests have no destinations.
    let loader =
        unsafe { PrefetchLoader::new(requests.collect(), PrefetchOptions::default()) }.expect("begun");
    while !matches!(loader.next(Duration::from_secs(60)).expect("read"), NextTensor::End) {}
    assert_eq!(bucket.most_at_once.load(Ordering::SeqCst), 1);
    assert!(bucket.requests().is_sorted(), "in the order of the file");
}
