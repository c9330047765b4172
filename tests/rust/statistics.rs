//! Statistics of the tensors of a file, however it is read and divided.

mod common;

use std::path::Path;
use std::sync::Mutex;

use common::{assert_error, directory, pattern, with_file};
use safetensors_torch::{
    Backend, ByteSource, Destination, Dtype, ErrorKind, Histogram, Result, SaveOptions, Statistics,
    StatisticsRequest, TensorFile, TensorSpec, save_file, set_threads,
};

/// The number of threads is a setting of the process.
static THREADS: Mutex<()> = Mutex::new(());

const MIB: u64 = 1 << 20;

/// Adds the elements of the tensor at `index` in pieces that end at these elements.
fn statistics_of(file: &TensorFile, index: usize, ends: &[u64]) -> (Statistics, Histogram) {
    let (mut statistics, mut histogram) = (Statistics::default(), Histogram::default());
    let mut first = 0;
    for &end in ends {
        let request = StatisticsRequest {
            index,
            first,
            count: end - first,
            statistics: &mut statistics,
            histogram: Some(&mut histogram),
        };
        file.compute_statistics(&mut [request]).expect("computed");
        first = end;
    }
    (statistics, histogram)
}

fn request<'a>(
    index: usize,
    first: u64,
    count: u64,
    statistics: &'a mut Statistics,
) -> StatisticsRequest<'a> {
    StatisticsRequest { index, first, count, statistics, histogram: None }
}

/// Small finite values, and some that are not.
fn floats(count: u64) -> Vec<u8> {
    let value = |index: u64| match index % 100_003 {
        17 => f32::NAN,
        18 => f32::INFINITY,
        _ => (index.wrapping_mul(0x9E37_79B9) % 65_536) as f32 / 65_536.0 - 0.25,
    };
    (0..count).flat_map(|index| value(index).to_le_bytes()).collect()
}

/// Saves a large tensor and many small ones.
fn save(path: &Path) -> Vec<u8> {
    let large = floats(5 * MIB / 2 + 7);
    let shapes = [[large.len() as u64 / 4], [0], [3]];
    let names: Vec<String> = (0..40).map(|number| format!("small.{number:02}")).collect();
    let mut specs = vec![TensorSpec { name: "large", dtype: Dtype::F32, shape: &shapes[0] }];
    let mut data = vec![&large[..]];
    for name in &names {
        specs.push(TensorSpec { name, dtype: Dtype::F32, shape: &shapes[2] });
        data.push(&large[..12]);
    }
    specs.push(TensorSpec { name: "empty", dtype: Dtype::F32, shape: &shapes[1] });
    data.push(&[]);
    save_file(&specs, &data, None, path, SaveOptions::default()).expect("saved");
    large
}

#[derive(Debug)]
struct Bytes(Vec<u8>);

impl ByteSource for Bytes {
    fn length(&self) -> Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<()> {
        destination.write(&self.0[offset as usize..][..destination.remaining()]);
        Ok(())
    }
}

#[test]
fn threads_pieces_and_sources_do_not_change_a_bit() {
    let _threads = THREADS.lock();
    let directory = directory();
    let path = directory.path().join("model.safetensors");
    let large = save(&path);
    let count = large.len() as u64 / 4;
    let bytes = std::fs::read(&path).expect("there");
    let source =
        TensorFile::from_source(Box::new(Bytes(bytes.clone())), "memory://x".as_ref()).expect("valid");
    let mapped = TensorFile::open(&path, Backend::Mmap).expect("valid");
    let read = TensorFile::open(&path, Backend::Pread).expect("valid");
    let index = read.require("large").expect("there");
    let part = MIB / 4;
    let expected = statistics_of(&read, index, &[count]);
    let values = large.chunks(4).map(|value| f32::from_le_bytes(value.try_into().expect("four bytes")));
    let finite: Vec<f64> = values.filter(|value| value.is_finite()).map(f64::from).collect();
    let mean = finite.iter().sum::<f64>() / finite.len() as f64;
    let squares: f64 = finite.iter().map(|value| (value - mean).powi(2)).sum();
    assert_eq!(expected.0.count - expected.0.nans - expected.0.infinities, finite.len() as u64);
    assert_eq!((expected.0.nans, expected.0.infinities), (27, 27));
    assert!(
        (expected.0.mean - mean).abs() < 1e-12
            && (expected.0.squared_deviations / squares - 1.0).abs() < 1e-10
    );
    assert_eq!(expected.1.counts().iter().sum::<u64>(), finite.len() as u64);
    for threads in [1, 2, 5] {
        set_threads(threads);
        for file in [&mapped, &read, &source] {
            for ends in
                [vec![count], vec![part, 5 * part, count], (1..12).map(|n| (n * part).min(count)).collect()]
            {
                assert!(statistics_of(file, index, &ends) == expected, "{threads} {ends:?}");
            }
        }
        with_file(&bytes, |file| assert!(statistics_of(file, index, &[count]) == expected)).expect("valid");
    }
    set_threads(0);
    // Other pieces change the last bits only.
    let (odd, histogram) = statistics_of(&read, index, &[1, 1, 1000, count - 1, count]);
    assert_eq!(histogram, expected.1);
    assert_eq!(
        (odd.minimum, odd.maximum, odd.zeros),
        (expected.0.minimum, expected.0.maximum, expected.0.zeros)
    );
    assert!((odd.mean - mean).abs() < 1e-12);
}

#[test]
fn many_tensors_are_added_with_one_call() {
    let directory = directory();
    let path = directory.path().join("model.safetensors");
    save(&path);
    let file = TensorFile::open(&path, Backend::Mmap).expect("valid");
    let names: Vec<&str> = file.header().iter().map(|tensor| tensor.name).collect();
    let mut all = vec![Statistics::default(); names.len()];
    let counts = file.header().iter().map(|tensor| tensor.nbytes() / 4);
    let mut requests: Vec<_> = all
        .iter_mut()
        .zip(counts)
        .enumerate()
        .map(|(index, (statistics, count))| request(index, 0, count, statistics))
        .collect();
    file.compute_statistics(&mut requests).expect("computed");
    for (name, found) in names.iter().zip(&all) {
        match *name {
            "large" => assert!(found.count > MIB),
            "empty" => assert_eq!(*found, Statistics::default()),
            _ => assert_eq!((found.count, found.minimum), (3, -0.25)),
        }
    }
}

#[test]
fn requests_are_checked_before_anything_is_read() {
    let directory = directory();
    let path = directory.path().join("model.safetensors");
    let spec = |name, dtype, shape| TensorSpec { name, dtype, shape };
    let specs =
        [spec("a", Dtype::F32, &[4][..]), spec("b", Dtype::F6E2M3, &[4]), spec("c", Dtype::F4, &[2, 3])];
    let data = pattern(16);
    save_file(&specs, &[&data, &data[..3], &data[..3]], None, &path, SaveOptions::default()).expect("saved");
    let file = TensorFile::open(&path, Backend::Pread).expect("valid");
    let refuse = |name: &str, first, count, kind, text: &str| {
        let (mut sound, mut statistics) = (Statistics::default(), Statistics::default());
        let index = file.require(name).expect("there");
        let outcome = file.compute_statistics(&mut [
            request(0, 0, 4, &mut sound),
            request(index, first, count, &mut statistics),
        ]);
        assert_error(outcome, kind, &path, text);
        assert_eq!(sound, Statistics::default());
    };
    refuse(
        "a",
        0,
        5,
        ErrorKind::Slice,
        "statistics of tensor \"a\": 5 elements from 0 on are not within its 4",
    );
    refuse("a", 5, 0, ErrorKind::Slice, "not within its 4 elements");
    refuse("a", u64::MAX, 1, ErrorKind::Slice, "not within its 4 elements");
    refuse("a", 1, u64::MAX, ErrorKind::Slice, "not within its 4 elements");
    refuse("b", 0, 0, ErrorKind::UnsupportedDtype, "convert it first");
    refuse("c", 1, 4, ErrorKind::Slice, "middle of a byte");
    refuse("c", 0, 3, ErrorKind::Slice, "use even numbers");
    let outcome = file.compute_statistics(&mut [request(9, 0, 1, &mut Statistics::default())]);
    assert_error(outcome, ErrorKind::InvalidArgument, &path, "tensor index 9");
    let mut found = Statistics::default();
    let index = file.require("c").expect("there");
    file.compute_statistics(&mut [request(index, 2, 4, &mut found)]).expect("whole bytes");
    assert_eq!(found.count, 4);
}

#[test]
fn a_file_that_became_shorter_is_an_error() {
    let directory = directory();
    let path = directory.path().join("model.safetensors");
    let count = save(&path).len() as u64 / 4;
    let file = TensorFile::open(&path, Backend::Pread).expect("valid");
    let index = file.require("large").expect("there");
    std::fs::OpenOptions::new().write(true).open(&path).expect("there").set_len(6 * MIB).expect("shorter");
    let mut statistics = Statistics::default();
    let outcome = file.compute_statistics(&mut [request(index, 0, count, &mut statistics)]);
    assert_error(outcome, ErrorKind::FileChanged, &path, "the bytes were for tensor \"large\"");
}
