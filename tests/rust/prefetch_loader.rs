//! Tensors that are handed out as soon as they have landed: order, destinations, slices, files, failures, and the end.

mod common;

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{naive_slice, pattern};
use proptest::collection::vec;
use proptest::prelude::*;
use safetensors_torch::{
    AxisRange, Backend, Dtype, Error, ErrorKind, NextTensor, PrefetchLoader, PrefetchOptions,
    PrefetchRequest, PrefetchedTensor, ReadFrom, SaveOptions, TensorFile, TensorSpec, save_file,
};

/// Far longer than any read here takes.
const LONG: Duration = Duration::from_secs(60);

const BACKENDS: [Backend; 2] = [Backend::Mmap, Backend::Pread];

fn save_sizes(path: &Path, sizes: &[usize]) -> Vec<Vec<u8>> {
    let names: Vec<String> = (0..sizes.len()).map(|i| format!("t{i:06}")).collect();
    let data: Vec<Vec<u8>> =
        sizes.iter().enumerate().map(|(skip, &size)| pattern(size + skip).split_off(skip)).collect();
    let shapes: Vec<[u64; 1]> = sizes.iter().map(|&size| [size as u64]).collect();
    let specs: Vec<TensorSpec> =
        names.iter().zip(&shapes).map(|(name, shape)| TensorSpec { name, dtype: Dtype::U8, shape }).collect();
    let bytes: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    save_file(&specs, &bytes, None, path, SaveOptions::default()).expect("saved");
    data
}

fn open(path: &Path, backend: Backend) -> Arc<TensorFile> {
    Arc::new(TensorFile::open(path, backend).expect("valid"))
}

fn request(file: &Arc<TensorFile>, index: usize) -> PrefetchRequest {
    PrefetchRequest { file: Arc::clone(file), index, slice: None, destination: None, extra_bytes: 0 }
}

fn whole(file: &Arc<TensorFile>) -> Vec<PrefetchRequest> {
    (0..file.header().len()).map(|index| request(file, index)).collect()
}

fn start(requests: Vec<PrefetchRequest>, options: PrefetchOptions) -> PrefetchLoader {
    // SAFETY: no request has a destination; `destinations_are_filled` makes its own loader.
    unsafe { PrefetchLoader::new(requests, options) }.expect("valid")
}

/// Returns the bytes of a tensor of `size` bytes that has landed.
fn bytes(tensor: &PrefetchedTensor, size: usize) -> &[u8] {
    assert!(tensor.owner.is_some());
    // SAFETY: `owner` keeps the bytes allocated.
    unsafe { std::slice::from_raw_parts(tensor.start, size) }
}

fn next(loader: &PrefetchLoader) -> Result<Option<PrefetchedTensor>, Error> {
    match loader.next(LONG)? {
        NextTensor::Ready(tensor) => Ok(Some(tensor)),
        NextTensor::NotReady => panic!("nothing has landed"),
        NextTensor::End => Ok(None),
    }
}

/// Returns the descriptors of this process that refer to a file in `directory`.
fn descriptors(directory: &Path) -> usize {
    let links = fs::read_dir("/proc/self/fd").expect("listed");
    links
        .filter_map(|link| fs::read_link(link.ok()?.path()).ok())
        .filter(|to| to.starts_with(directory))
        .count()
}

#[test]
fn one_thread_delivers_several_files_in_the_order_of_the_requests() {
    let directory = common::directory();
    let sizes = [0, 1, 65_537, 3_000_000, 17, 9_000_000, 0];
    for backend in BACKENDS {
        let paths: Vec<PathBuf> = (0..3).map(|i| directory.path().join(format!("{i}.safetensors"))).collect();
        let data: Vec<Vec<Vec<u8>>> = paths.iter().map(|path| save_sizes(path, &sizes)).collect();
        let files: Vec<Arc<TensorFile>> = paths.iter().map(|path| open(path, backend)).collect();
        let order = [2, 0, 1, 0];
        let requests: Vec<PrefetchRequest> = order.iter().flat_map(|&file| whole(&files[file])).collect();
        let options = PrefetchOptions { threads: Some(1), buffer_bytes: 10 << 20, ..Default::default() };
        let loader = start(requests, options);
        assert_eq!(loader.len(), order.len() * sizes.len());
        let mut number = 0;
        while let Some(tensor) = next(&loader).expect("read") {
            assert_eq!(tensor.request, number);
            let (file, index) = (order[number / sizes.len()], number % sizes.len());
            assert!(bytes(&tensor, sizes[index]) == data[file][index], "{backend:?}, tensor {number}");
            number += 1;
            let open = descriptors(directory.path());
            // The file that is read and the next one are open, with the backend `Pread` besides the three handles.
            assert!(open <= if backend == Backend::Mmap { 2 } else { 5 }, "{open} files are open");
        }
        assert_eq!(number, loader.len());
        drop(loader);
        drop(files);
        assert_eq!(descriptors(directory.path()), 0);
    }
}

#[test]
fn slices_are_cut_from_any_dimension() {
    let directory = common::directory();
    let path = directory.path().join("one.safetensors");
    let shape = [60, 50, 1700];
    let data = pattern(shape.iter().product::<u64>() as usize * 4);
    let spec = TensorSpec { name: "x", dtype: Dtype::F32, shape: &shape };
    save_file(&[spec], &[&data], None, &path, SaveOptions::default()).expect("saved");
    let range = |start, stop, step| AxisRange { start, stop, step };
    let cuts = [
        [range(0, 60, 1), range(0, 50, 1), range(0, 1700, 1)],
        [range(7, 53, 1), range(0, 50, 1), range(0, 1700, 1)],
        [range(0, 60, 2), range(3, 48, 1), range(0, 1700, 1)],
        [range(1, 60, 1), range(0, 50, 1), range(1, 1700, 2)],
        [range(0, 60, 1), range(5, 5, 1), range(0, 1700, 1)],
    ];
    for backend in BACKENDS {
        let file = open(&path, backend);
        let requests = cuts.iter().map(|ranges| {
            let slice = file.slice(0, ranges).expect("within");
            PrefetchRequest { slice: Some(slice), ..request(&file, 0) }
        });
        let loader = start(requests.collect(), PrefetchOptions::default());
        for _ in &cuts {
            let tensor = next(&loader).expect("read").expect("not the end");
            let expected = naive_slice(&data, 4, &shape, &cuts[tensor.request]);
            assert!(bytes(&tensor, expected.len()) == expected, "{:?}", cuts[tensor.request]);
        }
        assert!(next(&loader).expect("read").is_none());
    }
}

#[test]
fn destinations_are_filled() {
    let directory = common::directory();
    let path = directory.path().join("model.safetensors");
    let sizes = [100, 5 << 20, 0, 300, 9_000_001];
    let data = save_sizes(&path, &sizes);
    for backend in BACKENDS {
        let file = open(&path, backend);
        let mut buffers: Vec<Vec<u8>> = sizes.iter().map(|&size| vec![0x55; size]).collect();
        let mut requests = whole(&file);
        for (request, buffer) in requests.iter_mut().zip(&mut buffers) {
            request.destination = Some((buffer.as_mut_ptr(), buffer.len()));
        }
        // SAFETY: the buffers outlive the loader, and are compared after it.
        let loader = unsafe { PrefetchLoader::new(requests, PrefetchOptions::default()) }.expect("valid");
        while let Some(tensor) = next(&loader).expect("read") {
            assert!(tensor.owner.is_none());
            assert_eq!(tensor.start, buffers[tensor.request].as_mut_ptr());
        }
        drop(loader);
        assert!(buffers == data);
    }
    let file = open(&path, Backend::Pread);
    let mut short = [0; 99];
    let wrong = PrefetchRequest { destination: Some((short.as_mut_ptr(), 99)), ..request(&file, 0) };
    // SAFETY: the buffer outlives the call, which fails.
    let refused = unsafe { PrefetchLoader::new(vec![wrong], PrefetchOptions::default()) };
    common::assert_error(refused, ErrorKind::BufferSize, &path, "takes 100 bytes, but the buffer has 99");
    // SAFETY: there is no destination.
    let refused = unsafe { PrefetchLoader::new(vec![request(&file, 5)], PrefetchOptions::default()) };
    common::assert_error(refused, ErrorKind::InvalidArgument, &path, "tensor index 5");
}

#[test]
fn a_tensor_that_is_taken_by_number_goes_first() {
    let directory = common::directory();
    let path = directory.path().join("model.safetensors");
    let data = save_sizes(&path, &[9 << 20; 20]);
    let file = open(&path, Backend::Pread);
    let options = PrefetchOptions { buffer_bytes: 1, threads: Some(2), ..Default::default() };
    let loader = start(whole(&file), options);
    for number in [19, 3] {
        let tensor = loader.take(number, LONG).expect("read").expect("landed");
        assert_eq!(tensor.request, number);
        assert!(bytes(&tensor, data[number].len()) == data[number]);
    }
    let error = loader.take(3, LONG).expect_err("delivered");
    assert!(error.to_string().contains("tensor \"t000003\": already delivered"), "{error}");
    assert_eq!(loader.take(20, LONG).expect_err("too large").kind(), ErrorKind::InvalidArgument);
    let mut rest = Vec::new();
    while let Some(tensor) = next(&loader).expect("read") {
        rest.push(tensor.request);
    }
    let expected: Vec<usize> = (0..19).filter(|&number| number != 3).collect();
    assert_eq!(rest, expected);
}

#[test]
fn a_tensor_to_be_taken_may_not_have_landed() {
    let directory = common::directory();
    let path = directory.path().join("model.safetensors");
    save_sizes(&path, &[200 << 20]);
    let file = open(&path, Backend::Pread);
    for threads in [Some(0), Some(1)] {
        let options = PrefetchOptions { threads, ..Default::default() };
        let loader = start(whole(&file), options);
        assert!(loader.take(0, Duration::ZERO).expect("read").is_none());
        assert!(matches!(loader.next(Duration::ZERO).expect("read"), NextTensor::NotReady));
        assert!(loader.take(0, LONG).expect("read").is_some());
    }
}

#[test]
fn polls_pass_the_budget_only_once_all_started_tensors_have_landed() {
    let directory = common::directory();
    let path = directory.path().join("model.safetensors");
    // Each has two chunks, and a poll without threads reads one.
    let data = save_sizes(&path, &[9 << 20; 4]);
    let file = open(&path, Backend::Pread);
    let poll = |loader: &PrefetchLoader, number| loader.take(number, Duration::ZERO).expect("read");

    let options = PrefetchOptions { buffer_bytes: 1, threads: Some(0), ..Default::default() };
    let loader = start(whole(&file), options);
    assert!(poll(&loader, 1).is_none());
    assert!(poll(&loader, 2).is_none(), "the first chunk of tensor 1 is read, and not the second");
    let NextTensor::Ready(first) = loader.next(Duration::ZERO).expect("read") else {
        panic!("nothing landed")
    };
    assert_eq!(first.request, 1, "the poll of tensor 2 has read the rest of tensor 1");

    for threads in [Some(0), Some(2)] {
        let loader = start(whole(&file), PrefetchOptions { threads, ..options });
        let deadline = Instant::now() + LONG;
        let polled = std::iter::repeat_with(|| poll(&loader, 3)).take_while(|_| Instant::now() < deadline);
        let last = polled.flatten().next().expect("started although the budget is full");
        assert!(bytes(&last, data[3].len()) == data[3]);
    }
}

#[test]
fn changes_to_a_mapping_are_read_if_wanted() {
    let directory = common::directory();
    let path = directory.path().join("model.safetensors");
    let data = save_sizes(&path, &[9 << 20]);
    let file = open(&path, Backend::Mmap);
    let at = file.data_ptr(&file.tensor(0).expect("there")).expect("mapped").cast_mut();
    // SAFETY: the mapping is private and writable, and nothing else uses it now.
    unsafe { at.write(!data[0][0]) };
    for (read_from, first) in [(ReadFrom::File, data[0][0]), (ReadFrom::Mapping, !data[0][0])] {
        let loader = start(whole(&file), PrefetchOptions { read_from, ..Default::default() });
        let tensor = next(&loader).expect("read").expect("one");
        assert_eq!(bytes(&tensor, 1)[0], first);
        assert!(bytes(&tensor, data[0].len())[1..] == data[0][1..]);
    }
}

#[test]
fn a_tensor_without_memory_is_an_error_of_every_call() {
    if fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "1") {
        return; // no allocation fails
    }
    let directory = common::directory();
    let path = directory.path().join("model.safetensors");
    save_sizes(&path, &[20 << 20]);
    let sparse = directory.path().join("sparse.safetensors");
    let bytes = 4_u64 << 40;
    let header =
        format!("{{\"huge\":{{\"dtype\":\"U8\",\"shape\":[{bytes}],\"data_offsets\":[0,{bytes}]}}}}");
    let start_bytes = common::file_bytes(&header, &[]);
    fs::write(&sparse, &start_bytes).expect("written");
    let length = start_bytes.len() as u64 + bytes;
    OpenOptions::new().write(true).open(&sparse).and_then(|file| file.set_len(length)).expect("grown");
    let requests =
        || vec![request(&open(&path, Backend::Pread), 0), request(&open(&sparse, Backend::Pread), 0)];
    let begun = Instant::now();
    for threads in [Some(0), Some(2)] {
        let options = PrefetchOptions { threads, buffer_bytes: 1, ..Default::default() };
        for by_number in [true, false] {
            let loader = start(requests(), options);
            let error = if by_number {
                loader.take(1, LONG).expect_err("no memory")
            } else {
                std::iter::repeat_with(|| next(&loader)).find_map(Result::err).expect("no memory")
            };
            assert_eq!(error.os_error(), Some(libc::ENOMEM), "{error}");
            assert!(error.to_string().contains("tensor \"huge\""), "{error}");
        }
    }
    assert!(begun.elapsed() < LONG, "a call has waited for a loader that had failed");
}

#[test]
fn a_failed_read_ends_everything() {
    let directory = common::directory();
    for (sizes, threads) in [(vec![100, 200], None), (vec![3 << 20, 9 << 20], Some(3))] {
        for backend in BACKENDS {
            let path = directory.path().join("model.safetensors");
            save_sizes(&path, &sizes);
            let file = open(&path, backend);
            if backend == Backend::Mmap && sizes[0] < 1 << 20 {
                continue; // read through the mapping: a truncated file ends the process
            }
            let length = file.byte_range(&file.tensor(1).expect("there")).end - 1;
            OpenOptions::new().write(true).open(&path).expect("there").set_len(length).expect("cut");
            let loader = start(whole(&file), PrefetchOptions { threads, ..Default::default() });
            let error = loop {
                match next(&loader) {
                    Ok(tensor) => assert!(tensor.is_some(), "the second tensor is cut short"),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), ErrorKind::FileChanged);
            assert_eq!(error.to_string().matches("model.safetensors").count(), 1, "{error}");
            assert!(error.to_string().contains("for tensor \"t00000"), "{error}");
            for _ in 0..2 {
                let again = loader.next(LONG).expect_err("it has failed").to_string();
                assert!(again.contains("an earlier call has returned the error"), "{again}");
                loader.take(0, LONG).expect_err("it has failed");
            }
            // The other threads may still be in a read.
            let deadline = Instant::now() + LONG;
            while descriptors(directory.path()) > usize::from(backend == Backend::Pread) {
                assert!(Instant::now() < deadline, "a file stays open");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(tsan) { 8 } else { 60 }))]

    #[test]
    fn no_order_of_calls_and_no_budget_makes_a_caller_wait_forever(
        small in vec(0usize..70_000, 0..40),
        large in vec(0usize..9_000_000, 0..4),
        buffer_bytes in prop::sample::select(&[0, 1, 1000, 100_000, 3 << 20, 12 << 20, usize::MAX]),
        threads in prop::sample::select(&[Some(0), Some(1), Some(3), None]),
        extra_bytes in prop::sample::select(&[0, 5000]),
        choices in vec(any::<prop::sample::Index>(), 1..50),
        // So many of ten calls take a tensor by number.
        takes in prop::sample::select(&[0, 3, 10]),
    ) {
        let directory = common::directory();
        let path = directory.path().join("model.safetensors");
        let data = save_sizes(&path, &[small, large].concat());
        let file = open(&path, Backend::Mmap);
        let requests = (0..data.len()).map(|index| PrefetchRequest { extra_bytes, ..request(&file, index) });
        let options = PrefetchOptions { buffer_bytes, threads, ..PrefetchOptions::default() };
        let loader = start(requests.collect(), options);
        let mut left: Vec<usize> = (0..data.len()).collect();
        for (number, choice) in choices.iter().cycle().enumerate() {
            let tensor = if number % 10 < takes && !left.is_empty() {
                let request = left[choice.index(left.len())];
                let tensor = loader.take(request, LONG).expect("read").expect("landed");
                prop_assert_eq!(tensor.request, request);
                tensor
            } else {
                let Some(tensor) = next(&loader).expect("read") else { break };
                tensor
            };
            prop_assert!(loader.take(tensor.request, LONG).is_err(), "delivered twice");
            let expected = &data[tensor.request];
            prop_assert!(bytes(&tensor, expected.len()) == expected);
            let at = left.iter().position(|&request| request == tensor.request);
            left.remove(at.expect("not delivered before"));
        }
        prop_assert!(left.is_empty());
    }
}

#[test]
fn no_more_is_read_ahead_than_the_budget_holds() {
    let directory = common::directory();
    let path = directory.path().join("model.safetensors");
    let data = save_sizes(&path, &[1 << 20; 8]);
    let file = open(&path, Backend::Pread);
    // The tensors that are read when so many were taken. The one that was taken last is in the budget, too.
    let cases = [
        (3_500_000, 0, [(0, 3), (1, 3), (2, 4), (5, 7)]),
        (3_500_000, 1 << 20, [(0, 1), (1, 2), (2, 3), (5, 6)]),
        (1, 0, [(0, 1), (1, 2), (2, 3), (5, 6)]),
        (usize::MAX, 0, [(0, 8), (1, 8), (2, 8), (5, 8)]),
    ];
    for (buffer_bytes, extra_bytes, counts) in cases {
        for (taken, expected) in counts {
            let read = |wait: Duration| {
                let mut buffers = vec![vec![0; 1 << 20]; data.len()];
                let mut requests = whole(&file);
                for (request, buffer) in requests.iter_mut().zip(&mut buffers) {
                    request.destination = Some((buffer.as_mut_ptr(), buffer.len()));
                    request.extra_bytes = extra_bytes;
                }
                let options = PrefetchOptions { buffer_bytes, threads: Some(2), ..Default::default() };
                // SAFETY: the buffers outlive the loader, and are compared after it.
                let loader = unsafe { PrefetchLoader::new(requests, options) }.expect("valid");
                for _ in 0..taken {
                    next(&loader).expect("read").expect("not the end");
                }
                std::thread::sleep(wait);
                drop(loader);
                buffers.iter().zip(&data).filter(|(buffer, data)| buffer == data).count()
            };
            // A slow machine needs longer; a loader that reads too much does so at once.
            let waits = [100, 1000, 10_000].map(Duration::from_millis);
            let count = waits.into_iter().map(read).find(|&count| count >= expected);
            assert_eq!(count, Some(expected), "{taken} taken, budget {buffer_bytes}");
        }
    }
}

#[test]
fn tensors_without_bytes_are_ready_at_once() {
    let directory = common::directory();
    for sizes in [vec![0], vec![0, 0, 0], vec![5, 0]] {
        let path = directory.path().join("empty.safetensors");
        save_sizes(&path, &sizes);
        let loader = start(
            whole(&open(&path, Backend::Pread)).into_iter().collect(),
            PrefetchOptions { threads: Some(0), buffer_bytes: 1, ..Default::default() },
        );
        let begun = std::time::Instant::now();
        for _ in &sizes {
            assert!(next(&loader).expect("read").is_some());
        }
        assert!(next(&loader).expect("end").is_none());
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
}
