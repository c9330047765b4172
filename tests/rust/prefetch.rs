//! Reading through slabs: every byte arrives once, for all sizes and however long the caller keeps a slab.

mod common;

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{naive_slice, pattern};
use safetensors_torch::{
    AxisRange, Backend, Dtype, Error, ErrorKind, NextSlab, PrefetchOptions, PrefetchRequest, Prefetcher,
    ReadFrom, SLAB_PART_ALIGNMENT, SaveOptions, TensorFile, TensorSpec, save_file,
};

/// The caller of a prefetcher, which owns the slabs.
struct Caller {
    slabs: Vec<Vec<u8>>,
    slab_bytes: usize,
}

impl Caller {
    fn new(count: usize, slab_bytes: usize) -> Caller {
        Caller { slabs: (0..count).map(|_| vec![0x55; slab_bytes]).collect(), slab_bytes }
    }

    fn starts(&mut self) -> Vec<*mut u8> {
        self.slabs.iter_mut().map(|slab| slab.as_mut_ptr()).collect()
    }

    /// Copies all parts into `results`. Keeps up to `held` slabs, and overwrites each before it releases it.
    fn collect(
        &mut self,
        prefetcher: &Prefetcher,
        results: &mut [Vec<u8>],
        held: usize,
    ) -> Result<(), Error> {
        let mut kept: Vec<usize> = Vec::new();
        loop {
            match prefetcher.next_slab(Duration::from_millis(5))? {
                NextSlab::End => break,
                NextSlab::NotReady => {}
                NextSlab::Filled(slab, parts) => {
                    let mut end = 0;
                    for part in parts {
                        assert!(
                            part.length > 0
                                && part.slab_offset.is_multiple_of(SLAB_PART_ALIGNMENT)
                                && part.slab_offset >= end
                        );
                        end = part.slab_offset + part.length;
                        assert!(end <= self.slab_bytes);
                        let is_last = part.offset + part.length == results[part.request].len();
                        assert!(
                            is_last || part.length.is_multiple_of(SLAB_PART_ALIGNMENT),
                            "elements are not split"
                        );
                        results[part.request][part.offset..][..part.length]
                            .copy_from_slice(&self.slabs[slab][part.slab_offset..end]);
                    }
                    kept.push(slab);
                }
            }
            while kept.len() > held {
                let slab = kept.remove(0);
                self.slabs[slab].fill(0xEE);
                prefetcher.release_slab(slab);
            }
            if kept.len() == self.slabs.len() {
                prefetcher.release_slab(kept.remove(0));
            }
        }
        Ok(())
    }
}

fn request(file: &Arc<TensorFile>, index: usize) -> PrefetchRequest {
    PrefetchRequest { file: Arc::clone(file), index, slice: None, destination: None, extra_bytes: 0 }
}

fn at_most(threads: Option<usize>) -> PrefetchOptions {
    PrefetchOptions { threads, ..PrefetchOptions::default() }
}

/// Starts to read into the slabs at `starts`, which must outlive the prefetcher.
fn start(
    requests: Vec<PrefetchRequest>,
    options: PrefetchOptions,
    starts: &[*mut u8],
    slab_bytes: usize,
) -> Prefetcher {
    let prefetcher = Prefetcher::new(requests, options, slab_bytes).expect("there");
    for (number, &slab) in starts.iter().enumerate() {
        // SAFETY: a caller's slabs are distinct and outlive the prefetcher; it touches one only between next and release.
        assert_eq!(unsafe { prefetcher.add_slab(slab) }, number);
    }
    prefetcher
}

const SIZES: [usize; 9] = [0, 1, 15, 16, 17, 1000, 65_537, 900_001, 3_000_000];

fn save_sizes(directory: &Path, sizes: &[usize]) -> (PathBuf, Vec<Vec<u8>>) {
    let path = directory.join("model.safetensors");
    let names: Vec<String> = (0..sizes.len()).map(|i| format!("t{i:06}")).collect();
    let data: Vec<Vec<u8>> =
        sizes.iter().enumerate().map(|(skip, &size)| pattern(size + skip).split_off(skip)).collect();
    let shapes: Vec<[u64; 1]> = sizes.iter().map(|&size| [size as u64]).collect();
    let specs: Vec<TensorSpec> =
        names.iter().zip(&shapes).map(|(name, shape)| TensorSpec { name, dtype: Dtype::U8, shape }).collect();
    let bytes: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    save_file(&specs, &bytes, None, &path, SaveOptions::default()).expect("saved");
    (path, data)
}

fn open(path: &Path, backend: Backend) -> Arc<TensorFile> {
    Arc::new(TensorFile::open(path, backend).expect("valid"))
}

#[test]
fn every_byte_arrives_with_any_slabs_and_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    let sizes: Vec<usize> = SIZES.iter().cycle().take(40).copied().collect();
    let (path, data) = save_sizes(directory.path(), &sizes);
    for (round, backend) in [Backend::Mmap, Backend::Pread].into_iter().cycle().take(16).enumerate() {
        let file = open(&path, backend);
        let (count, slab_bytes) = (1 + round % 5, [16, 4096, 100_000 / 16 * 16, 1 << 20][round % 4]);
        // The smallest slab is used with small tensors only.
        let mut indices: Vec<usize> =
            (0..sizes.len()).filter(|&i| sizes[i] < 1001 || slab_bytes > 16).collect();
        if round % 2 == 1 {
            indices.reverse();
        }
        let mut results: Vec<Vec<u8>> = indices.iter().map(|&index| vec![0; sizes[index]]).collect();
        let mut caller = Caller::new(count, slab_bytes);
        let threads = [None, Some(1), Some(4)][round % 3];
        let read_from = if round % 3 == 0 { ReadFrom::Mapping } else { ReadFrom::File };
        let options = PrefetchOptions { read_from, ..at_most(threads) };
        let requests = indices.iter().map(|&index| request(&file, index)).collect();
        let prefetcher = start(requests, options, &caller.starts(), slab_bytes);
        caller.collect(&prefetcher, &mut results, round % 4).expect("read");
        assert_eq!(prefetcher.next_slab(Duration::ZERO).expect("over"), NextSlab::End);
        drop(prefetcher);
        for (&index, result) in indices.iter().zip(&results) {
            assert!(*result == data[index], "round {round}, tensor {index} of {} bytes", sizes[index]);
        }
    }
}

#[test]
fn small_tensors_share_a_slab() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, _) = save_sizes(directory.path(), &[100; 1000]);
    let mut caller = Caller::new(1, 1 << 20);
    let indices: Vec<usize> = (0..1000).collect();
    let file = open(&path, Backend::Pread);
    let requests = indices.iter().map(|&index| request(&file, index)).collect();
    let prefetcher = start(requests, at_most(None), &caller.starts(), 1 << 20);
    match prefetcher.next_slab(Duration::ZERO).expect("read") {
        NextSlab::Filled(0, parts) => assert_eq!(parts.len(), 1000),
        other => panic!("{other:?}"),
    }
    assert_eq!(prefetcher.next_slab(Duration::ZERO).expect("read"), NextSlab::End);
}

#[test]
fn an_added_slab_wakes_a_starved_thread() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, data) = save_sizes(directory.path(), &[8 << 20]);
    let mut caller = Caller::new(4, 1 << 20);
    let starts = caller.starts();
    let requests = vec![request(&open(&path, Backend::Pread), 0)];
    let prefetcher = start(requests, at_most(Some(3)), &starts[..1], 1 << 20);
    let first = prefetcher.next_slab(Duration::from_secs(20)).expect("read");
    let NextSlab::Filled(slab, parts) = first else { panic!("{first:?}") };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !prefetcher.is_starved() {
        assert!(Instant::now() < deadline, "the other threads have nothing to fill");
        std::thread::yield_now();
    }
    let mut results = vec![vec![0; 8 << 20]];
    results[0][parts[0].offset..][..parts[0].length].copy_from_slice(&caller.slabs[slab][..parts[0].length]);
    for (number, &start) in starts.iter().enumerate().skip(1) {
        // SAFETY: as in `start`.
        assert_eq!(unsafe { prefetcher.add_slab(start) }, number);
    }
    prefetcher.release_slab(slab);
    caller.collect(&prefetcher, &mut results, 2).expect("read");
    assert!(results[0] == data[0]);
}

#[test]
fn dropping_a_prefetcher_stops_its_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, _) = save_sizes(directory.path(), &[16 << 20]);
    for taken in 0..3 {
        let mut caller = Caller::new(2, 1 << 20);
        let requests = vec![request(&open(&path, Backend::Pread), 0)];
        let prefetcher = start(requests, at_most(Some(4)), &caller.starts(), 1 << 20);
        for _ in 0..taken {
            prefetcher.next_slab(Duration::from_millis(50)).expect("read");
        }
        // The threads wait for a slab; dropping joins them.
        drop(prefetcher);
    }
}

#[test]
fn slices_are_prefetched() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("one.safetensors");
    let shape = [60, 50, 700];
    let data = pattern(shape.iter().product::<u64>() as usize * 4);
    let spec = TensorSpec { name: "x", dtype: Dtype::F32, shape: &shape };
    save_file(&[spec], &[&data], None, &path, SaveOptions::default()).expect("saved");
    let range = |start, stop, step| AxisRange { start, stop, step };
    let cuts = [
        [range(0, 60, 1), range(0, 50, 1), range(0, 700, 1)],
        [range(7, 53, 1), range(0, 50, 1), range(0, 700, 1)],
        [range(0, 60, 2), range(3, 48, 1), range(0, 700, 1)],
        [range(1, 60, 1), range(0, 50, 1), range(1, 700, 2)],
        [range(0, 60, 1), range(5, 5, 1), range(0, 700, 1)],
    ];
    let expected: Vec<Vec<u8>> = cuts.iter().map(|ranges| naive_slice(&data, 4, &shape, ranges)).collect();
    for (backend, threads) in [(Backend::Mmap, Some(3)), (Backend::Pread, Some(2)), (Backend::Pread, None)] {
        let file = open(&path, backend);
        let slices = cuts.iter().map(|ranges| file.slice(0, ranges).expect("within"));
        let requests = slices.map(|slice| PrefetchRequest { slice: Some(slice), ..request(&file, 0) });
        let mut caller = Caller::new(3, 64 << 10);
        let prefetcher = start(requests.collect(), at_most(threads), &caller.starts(), 64 << 10);
        let mut results: Vec<Vec<u8>> = expected.iter().map(|bytes| vec![0; bytes.len()]).collect();
        caller.collect(&prefetcher, &mut results, 1).expect("read");
        assert!(results == expected);
    }
}

#[test]
fn a_slab_holds_tensors_of_several_files() {
    let directories: Vec<_> = (0..5).map(|_| tempfile::tempdir().expect("a directory")).collect();
    let sizes = [100, 0, 70_000, 2_000_000];
    let saved: Vec<_> = directories.iter().map(|directory| save_sizes(directory.path(), &sizes)).collect();
    for backend in [Backend::Mmap, Backend::Pread] {
        let files: Vec<_> = saved.iter().map(|(path, _)| open(path, backend)).collect();
        let order: Vec<(usize, usize)> =
            (0..sizes.len()).flat_map(|index| (0..files.len()).map(move |file| (file, index))).collect();
        let requests = order.iter().map(|&(file, index)| request(&files[file], index)).collect();
        let mut caller = Caller::new(2, 1 << 20);
        let prefetcher = start(requests, at_most(None), &caller.starts(), 1 << 20);
        let mut results: Vec<Vec<u8>> = order.iter().map(|&(_, index)| vec![0; sizes[index]]).collect();
        caller.collect(&prefetcher, &mut results, 1).expect("read");
        for (&(file, index), result) in order.iter().zip(&results) {
            assert!(*result == saved[file].1[index], "{backend:?}: file {file}, tensor {index}");
        }
    }
}

/// Releases the slabs that arrive until the requests `expected`, of a MiB each, are complete and nothing follows for 50 ms.
fn expect_arrivals(prefetcher: &Prefetcher, expected: &[usize]) {
    let (mut requests, mut bytes) = (Vec::new(), 0);
    loop {
        let is_complete = bytes >= expected.len() << 20;
        let wait = if is_complete { Duration::from_millis(50) } else { Duration::from_secs(20) };
        let NextSlab::Filled(slab, parts) = prefetcher.next_slab(wait).expect("read") else { break };
        requests.extend(parts.iter().map(|part| part.request));
        bytes += parts.iter().map(|part| part.length).sum::<usize>();
        prefetcher.release_slab(slab);
    }
    requests.dedup();
    assert_eq!(requests, expected);
}

#[test]
fn no_more_is_started_than_the_budget_holds() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, _) = save_sizes(directory.path(), &[1 << 20; 8]);
    let file = open(&path, Backend::Pread);
    for threads in [Some(0), Some(1)] {
        for (buffer_bytes, extra_bytes) in [(5 << 19, 0), (5 << 20, 1 << 20)] {
            let requests = (0..8).map(|index| PrefetchRequest { extra_bytes, ..request(&file, index) });
            let options = PrefetchOptions { buffer_bytes, ..at_most(threads) };
            let mut caller = Caller::new(3, 256 << 10);
            let prefetcher = start(requests.collect(), options, &caller.starts(), 256 << 10);
            expect_arrivals(&prefetcher, &[0, 1]);
            assert!(!prefetcher.is_starved(), "a slab would not help");
            prefetcher.hand_out(1); // counts until the next
            expect_arrivals(&prefetcher, &[]);
            prefetcher.hand_out(0);
            expect_arrivals(&prefetcher, &[2]);
            prefetcher.prioritize(6);
            prefetcher.prioritize(2);
            expect_arrivals(&prefetcher, &[6]);
            prefetcher.hand_out(6);
            expect_arrivals(&prefetcher, &[]);
            prefetcher.hand_out(2);
            expect_arrivals(&prefetcher, &[3]);
            for (taken, next) in [(3, vec![4]), (4, vec![5]), (5, vec![7]), (7, vec![])] {
                prefetcher.hand_out(taken);
                expect_arrivals(&prefetcher, &next);
            }
            assert_eq!(prefetcher.next_slab(Duration::ZERO).expect("over"), NextSlab::End);
        }
        // A tensor that exceeds the budget is read alone.
        let requests = (0..3).map(|index| request(&file, index)).collect();
        let options = PrefetchOptions { buffer_bytes: 1, ..at_most(threads) };
        let mut caller = Caller::new(3, 256 << 10);
        let prefetcher = start(requests, options, &caller.starts(), 256 << 10);
        for request in 0..3 {
            expect_arrivals(&prefetcher, &[request]);
            prefetcher.hand_out(request);
        }
    }
}

#[test]
fn a_request_that_goes_first_interrupts_a_larger_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, data) = save_sizes(directory.path(), &[6 << 20, 100, 3 << 20]);
    let file = open(&path, Backend::Pread);
    let mut caller = Caller::new(1, 1 << 20);
    let requests = (0..3).map(|index| request(&file, index)).collect();
    let prefetcher = start(requests, at_most(Some(1)), &caller.starts(), 1 << 20);
    let mut results: Vec<Vec<u8>> = data.iter().map(|bytes| vec![0; bytes.len()]).collect();
    let mut order = Vec::new();
    loop {
        match prefetcher.next_slab(Duration::from_secs(20)).expect("read") {
            NextSlab::End => break,
            NextSlab::NotReady => panic!("nothing is read"),
            NextSlab::Filled(slab, parts) => {
                for part in parts {
                    results[part.request][part.offset..][..part.length]
                        .copy_from_slice(&caller.slabs[slab][part.slab_offset..][..part.length]);
                    order.push(part.request);
                }
                if order.len() == 1 {
                    prefetcher.prioritize(2);
                }
                prefetcher.release_slab(slab);
            }
        }
    }
    assert!(results == data);
    let places: Vec<usize> =
        (0..3).map(|request| order.iter().filter(|&&one| one == request).count()).collect();
    assert_eq!((order[0], places[1]), (0, 1));
    let last_urgent = order.iter().rposition(|&one| one == 2).expect("read");
    let last_large = order.iter().rposition(|&one| one == 0).expect("read");
    assert!(last_urgent < last_large && last_urgent <= 4, "{order:?}");
}

#[test]
fn no_slab_is_written_to_after_a_stop() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, _) = save_sizes(directory.path(), &[64 << 20]);
    for threads in [Some(0), Some(2)] {
        let mut caller = Caller::new(8, 1 << 20);
        let requests = vec![request(&open(&path, Backend::Mmap), 0)];
        let prefetcher = start(requests, at_most(threads), &caller.starts(), 1 << 20);
        let first = prefetcher.next_slab(Duration::from_secs(20)).expect("read");
        let NextSlab::Filled(slab, _) = first else { panic!("{first:?}") };
        prefetcher.stop();
        caller.slabs.iter_mut().for_each(|slab| slab.fill(0xAA));
        prefetcher.release_slab(slab);
        assert_eq!(prefetcher.next_slab(Duration::from_millis(20)).expect("over"), NextSlab::End);
        drop(prefetcher);
        assert!(caller.slabs.iter().flatten().all(|&byte| byte == 0xAA));
    }
}

#[test]
fn a_failed_read_names_file_and_tensor() {
    let directory = tempfile::tempdir().expect("a directory");
    for (sizes, threads) in [(vec![100, 200], None), (vec![3 << 20, 5 << 20], Some(3))] {
        let (path, _) = save_sizes(directory.path(), &sizes);
        let file = open(&path, Backend::Pread);
        let length = file.byte_range(&file.tensor(1).expect("there")).end - 1;
        OpenOptions::new().write(true).open(&path).expect("there").set_len(length).expect("cut");
        let mut caller = Caller::new(2, 1 << 20);
        let requests = vec![request(&file, 0), request(&file, 1)];
        let prefetcher = start(requests, at_most(threads), &caller.starts(), 1 << 20);
        let mut results: Vec<Vec<u8>> = sizes.iter().map(|&size| vec![0; size]).collect();
        let error = caller.collect(&prefetcher, &mut results, 0).expect_err("cut short");
        assert_eq!(error.kind(), ErrorKind::FileChanged);
        assert_eq!(error.to_string().matches("model.safetensors").count(), 1, "{error}");
        assert!(error.to_string().contains("for tensor \"t00000"), "{error}");
        // The prefetcher ends after the error, and does not hang.
        let deadline = Instant::now() + Duration::from_secs(20);
        while prefetcher.next_slab(Duration::from_millis(1)).expect("failed before") != NextSlab::End {
            assert!(Instant::now() < deadline);
        }
    }
}

#[test]
fn an_index_out_of_range_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, _) = save_sizes(directory.path(), &[10]);
    let refused = Prefetcher::new(vec![request(&open(&path, Backend::Pread), 1)], at_most(None), 16);
    assert_eq!(refused.expect_err("there is one").kind(), ErrorKind::InvalidArgument);
}
