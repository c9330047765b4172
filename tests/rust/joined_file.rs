//! Files that several processes write: their bytes, their errors, and what is left after an error.

mod common;

use std::fs;
use std::path::Path;

use common::{assert_error, directory, names, pattern, saved};
use proptest::prelude::*;
use safetensors_torch::{
    AtomicFile, AxisRange, Backend, DEFAULT_ALIGNMENT, Dtype, ErrorKind, IncrementalWriter, JoinedFile,
    SaveOptions, Slice, SliceRequest, TensorFile, TensorSpec,
};

fn begin(spec: TensorSpec<'_>, path: &Path) -> IncrementalWriter {
    IncrementalWriter::create(&[spec], None, path, SaveOptions::default()).expect("begun")
}

fn range(start: u64, stop: u64) -> AxisRange {
    AxisRange { start, stop, step: 1 }
}

/// Returns all boxes between the bounds in each dimension.
fn boxes(bounds: &[Vec<u64>]) -> Vec<Vec<AxisRange>> {
    let mut boxes = vec![Vec::new()];
    for bounds in bounds {
        let longer = |head: &Vec<AxisRange>| {
            let head = head.clone();
            bounds
                .windows(2)
                .map(move |pair| [&head[..], &[range(pair[0], pair[1])]].concat())
                .collect::<Vec<_>>()
        };
        boxes = boxes.iter().flat_map(longer).collect();
    }
    boxes
}

/// Returns the bytes of a box of a tensor.
fn cut(data: &[u8], dtype: Dtype, shape: &[u64], ranges: &[AxisRange]) -> Vec<u8> {
    let slice = Slice::plan("t", dtype, shape, ranges).expect("valid");
    slice.byte_ranges().flat_map(|run| data[run.start as usize..run.end as usize].to_vec()).collect()
}

fn divided() -> impl Strategy<Value = (Dtype, Vec<Vec<u64>>)> {
    let bounds = prop::collection::vec(0..9u64, 0..4).prop_map(|mut inner| {
        let size = inner.iter().copied().max().unwrap_or(0) + 1;
        inner.extend([0, size]);
        inner.sort_unstable();
        inner.dedup();
        inner
    });
    (
        prop::sample::select(&[Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::I64]),
        prop::collection::vec(bounds, 0..4),
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn boxes_of_several_writers_are_the_file_of_a_save(
        (dtype, bounds) in divided(),
        writers in 1..4usize,
        order in any::<u64>(),
    ) {
        let directory = directory();
        let path = directory.path().join("file");
        let shape: Vec<u64> = bounds.iter().map(|bounds| *bounds.last().expect("two bounds")).collect();
        let spec = TensorSpec { name: "t", dtype, shape: &shape };
        let elements: u64 = shape.iter().product();
        let data = pattern(elements as usize * dtype.bits() as usize / 8);
        let writer = begin(spec, &path);
        let staged = writer.make_joinable().expect("joinable");
        let files: Vec<JoinedFile> = (0..writers).map(|_| JoinedFile::open(&staged).expect("joined")).collect();
        let mut parts = boxes(&bounds);
        let count = parts.len();
        parts.rotate_left((order % count as u64) as usize);
        for (number, ranges) in parts.iter().enumerate() {
            let bytes = cut(&data, dtype, &shape, ranges);
            files[number % writers].write_slice("t", ranges, &bytes).expect("written");
        }
        for (number, file) in files.into_iter().enumerate() {
            file.finish(number == 0).expect("finished");
        }
        prop_assert!(!path.exists());
        writer.commit_joined().expect("committed");
        prop_assert!(fs::read(&path).expect("there") == saved(&[spec], &[&data], None, DEFAULT_ALIGNMENT).expect("saved"));
        prop_assert_eq!(names(directory.path()), ["file"]);
    }

    #[test]
    fn slices_that_are_read_together_are_those_of_one_read_each((dtype, bounds) in divided()) {
        let directory = directory();
        let path = directory.path().join("file");
        let shape: Vec<u64> = bounds.iter().map(|bounds| *bounds.last().expect("two bounds")).collect();
        let data = pattern(shape.iter().product::<u64>() as usize * dtype.bits() as usize / 8);
        let spec = TensorSpec { name: "t", dtype, shape: &shape };
        safetensors_torch::save_file(&[spec], &[&data], None, &path, SaveOptions::default()).expect("saved");
        for backend in [Backend::Mmap, Backend::Pread] {
            let file = TensorFile::open(&path, backend).expect("opened");
            let parts = boxes(&bounds);
            let mut buffers: Vec<Vec<u8>> =
                parts.iter().map(|ranges| vec![0; cut(&data, dtype, &shape, ranges).len()]).collect();
            let slices: Vec<Slice> = parts.iter().map(|ranges| file.slice(0, ranges).expect("valid")).collect();
            let request = |(slice, buffer)| {
                let buffer: &mut Vec<u8> = buffer;
                let (destination, nbytes) = (buffer.as_mut_ptr(), buffer.len());
                SliceRequest { index: 0, slice, destination, nbytes, strides: None }
            };
            let requests: Vec<SliceRequest<'_>> = slices.iter().zip(&mut buffers).map(request).collect();
            // SAFETY: each buffer is valid for writes of its length, and they do not overlap.
            unsafe { file.read_slices(&requests) }.expect("read");
            for (ranges, buffer) in parts.iter().zip(&buffers) {
                prop_assert_eq!(buffer, &cut(&data, dtype, &shape, ranges));
            }
        }
    }
}

const MATRIX: TensorSpec<'static> = TensorSpec { name: "matrix", dtype: Dtype::F32, shape: &[2, 3] };

#[test]
fn a_part_that_does_not_fit_is_refused() {
    let directory = directory();
    let writer = begin(MATRIX, &directory.path().join("file"));
    let file = JoinedFile::open(&writer.make_joinable().expect("joinable")).expect("joined");
    let rows = [range(0, 1), range(0, 3)];
    assert_error(
        file.write_slice("other", &rows, &[0; 12]),
        ErrorKind::TensorNotFound,
        directory.path(),
        "other",
    );
    assert_error(
        file.write_slice("matrix", &rows[..1], &[0; 12]),
        ErrorKind::Slice,
        directory.path(),
        "matrix",
    );
    assert_error(
        file.write_slice("matrix", &[range(0, 3), range(0, 3)], &[0; 36]),
        ErrorKind::Slice,
        directory.path(),
        "matrix",
    );
    assert_error(
        file.write_slice("matrix", &rows, &[0; 11]),
        ErrorKind::BufferSize,
        directory.path(),
        "it takes 12 bytes, but 11 were given",
    );
}

#[test]
fn only_a_staged_file_is_joined() {
    let directory = directory();
    let path = directory.path().join("model.safetensors");
    fs::write(&path, saved(&[MATRIX], &[&[0; 24]], None, DEFAULT_ALIGNMENT).expect("saved"))
        .expect("written");
    assert_error(
        JoinedFile::open(&path),
        ErrorKind::InvalidArgument,
        directory.path(),
        "model.safetensors: not a file that another process is saving",
    );
    assert_error(
        JoinedFile::open(&directory.path().join(".safetensors-1-0.tmp")),
        ErrorKind::Io,
        directory.path(),
        "directory that all processes share",
    );
    assert!(fs::read(&path).expect("there").ends_with(&[0; 24]));
}

#[test]
fn a_dropped_writer_leaves_nothing_and_the_target() {
    let directory = directory();
    let path = directory.path().join("file");
    fs::write(&path, "old").expect("written");
    let writer = begin(MATRIX, &path);
    let staged = writer.make_joinable().expect("joinable");
    assert_eq!(staged, writer.make_joinable().expect("the same again"));
    let file = JoinedFile::open(&staged).expect("joined");
    drop(writer);
    assert_eq!(names(directory.path()), ["file"]);
    // The other process learns from the first one; its file has no name any more.
    file.write_slice("matrix", &[range(0, 2), range(0, 3)], &[1; 24]).expect("written");
    file.finish(true).expect("finished");
    assert_eq!(fs::read(&path).expect("there"), b"old");
}

#[test]
fn a_writer_is_made_joinable_before_its_end() {
    let directory = directory();
    let writer = begin(MATRIX, &directory.path().join("file"));
    let tensor = writer.begin(MATRIX).expect("begun");
    assert_error(
        writer.make_joinable(),
        ErrorKind::InvalidArgument,
        directory.path(),
        "before the first write",
    );
    drop(tensor);
    writer.make_joinable().expect("joinable");
    assert_error(writer.commit(), ErrorKind::DataLength, directory.path(), "matrix");
    writer.commit_joined().expect("committed");
    assert_error(writer.make_joinable(), ErrorKind::Closed, directory.path(), "begin a new one");
}

#[test]
fn a_joinable_file_replaces_a_target_with_its_permissions() {
    use std::os::unix::fs::PermissionsExt;

    let directory = directory();
    let path = directory.path().join("file");
    fs::write(&path, "old").expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("set");
    let mut file = AtomicFile::create(&path, 3).expect("created");
    file.write([b"new"]).expect("written");
    let staged = file.make_joinable().expect("joinable");
    assert_eq!(fs::read(&staged).expect("there"), b"new");
    file.commit(true).expect("committed");
    assert!(!staged.exists());
    assert_eq!(fs::read(&path).expect("there"), b"new");
    assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o640);
}
