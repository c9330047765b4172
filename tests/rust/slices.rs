//! Many slices with one call, into row-major memory and into memory with strides.

mod common;

use std::path::Path;

use common::{assert_error, directory, pattern};
use proptest::prelude::*;
use safetensors_torch::{
    AxisRange, Backend, Dtype, ErrorKind, Result, SaveOptions, Slice, SliceRequest, TensorFile, TensorSpec,
    save_file,
};

/// A byte that nothing has written to.
const UNTOUCHED: u8 = 0xAA;

/// A tensor, a slice of it, and the strides of its destination.
#[derive(Clone, Debug)]
struct Case {
    dtype: Dtype,
    shape: Vec<u64>,
    ranges: Vec<AxisRange>,
    strides: Vec<u64>,
}

impl Case {
    /// Returns a case whose destination has its dimensions in this order, outermost first, each with a gap of so many elements
    /// after those inside it.
    fn new(dtype: Dtype, shape: &[u64], ranges: &[AxisRange], order: &[usize], gaps: &[u64]) -> Case {
        let (mut strides, mut extent) = (vec![0; shape.len()], 1);
        for (&axis, gap) in order.iter().rev().zip(gaps) {
            strides[axis] = extent + gap;
            extent += ranges[axis].len().saturating_sub(1) * strides[axis];
        }
        Case { dtype, shape: shape.to_vec(), ranges: ranges.to_vec(), strides }
    }

    fn item(&self) -> usize {
        self.dtype.bits() as usize / 8
    }

    fn data(&self) -> Vec<u8> {
        pattern(self.shape.iter().product::<u64>() as usize * self.item())
    }

    /// Returns the offset of each element of the slice in the tensor and in the destination, in elements.
    fn elements(&self) -> Vec<(usize, usize)> {
        let mut elements = vec![(0, 0)];
        for ((range, &dim), &stride) in self.ranges.iter().zip(&self.shape).zip(&self.strides) {
            let indices: Vec<usize> =
                (range.start as usize..range.stop as usize).step_by(range.step as usize).collect();
            elements = elements
                .iter()
                .flat_map(|&(from, to)| {
                    let place = move |(number, &index): (usize, &usize)| {
                        (from * dim as usize + index, to + number * stride as usize)
                    };
                    indices.iter().enumerate().map(place).collect::<Vec<_>>()
                })
                .collect();
        }
        elements
    }

    /// Returns the destination after the read: the elements, one by one, and bytes that are untouched.
    fn expected(&self) -> Vec<u8> {
        let (item, data) = (self.item(), self.data());
        let elements = self.elements();
        let last = elements.iter().map(|&(_, to)| to + 1).max().unwrap_or(0);
        let mut bytes = vec![UNTOUCHED; last * item];
        for (from, to) in elements {
            bytes[to * item..][..item].copy_from_slice(&data[from * item..][..item]);
        }
        bytes
    }

    fn save(&self, path: &Path) {
        let spec = TensorSpec { name: "t", dtype: self.dtype, shape: &self.shape };
        save_file(&[spec], &[&self.data()], None, path, SaveOptions::default()).expect("saved");
    }

    fn read(&self, file: &TensorFile, bytes: &mut [u8]) -> Result<()> {
        let slice = file.slice(0, &self.ranges)?;
        let (destination, nbytes) = (bytes.as_mut_ptr(), bytes.len());
        let request =
            SliceRequest { index: 0, slice: &slice, destination, nbytes, strides: Some(&self.strides) };
        // SAFETY: the buffer is valid for writes of its length, and nothing else refers to it.
        unsafe { file.read_slices(&[request]) }
    }

    /// Returns whether a file opened either way, and the same bytes in memory, are read as they should.
    fn is_read(&self, path: &Path) -> bool {
        self.save(path);
        let contents = std::fs::read(path).expect("there");
        // SAFETY: the bytes outlive the file, and are not written to.
        let in_memory = unsafe { TensorFile::from_memory(contents.as_ptr(), contents.len()) }.expect("valid");
        let opened =
            [Backend::Mmap, Backend::Pread].map(|backend| TensorFile::open(path, backend).expect("valid"));
        let expected = self.expected();
        opened.iter().chain([&in_memory]).all(|file| {
            let mut bytes = vec![UNTOUCHED; expected.len()];
            self.read(file, &mut bytes).expect("read");
            bytes == expected
        })
    }
}

fn range(start: u64, stop: u64, step: u64) -> AxisRange {
    AxisRange { start, stop, step }
}

fn all(shape: &[u64]) -> Vec<AxisRange> {
    shape.iter().map(|&dim| range(0, dim, 1)).collect()
}

fn dimension() -> impl Strategy<Value = (u64, AxisRange)> {
    let size = prop_oneof![8 => 0..7u64, 1 => 60..70u64, 1 => 1000..5000u64];
    size.prop_flat_map(|dim| {
        let whole = Just(range(0, dim, 1));
        let part = (0..=dim, 0..=dim, 1..4u64).prop_map(|(a, b, step)| range(a.min(b), a.max(b), step));
        (Just(dim), prop_oneof![whole, part])
    })
}

fn case() -> impl Strategy<Value = Case> {
    const DTYPES: &[Dtype] = &[Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::I64];
    prop::collection::vec(dimension(), 0..5)
        .prop_filter("small", |dimensions| {
            dimensions.iter().map(|(dim, _)| dim.max(&1)).product::<u64>() < 1 << 16
        })
        .prop_flat_map(|dimensions| {
            let (shape, ranges): (Vec<u64>, Vec<AxisRange>) = dimensions.into_iter().unzip();
            let order = Just((0..shape.len()).collect::<Vec<_>>());
            let order = prop_oneof![order.clone(), order.prop_shuffle()];
            let gap = prop_oneof![4 => Just(0), 1 => 1..4u64, 1 => Just(100)];
            let gaps = prop::collection::vec(gap, shape.len());
            (prop::sample::select(DTYPES), Just(shape), Just(ranges), order, gaps)
        })
        .prop_map(|(dtype, shape, ranges, order, gaps)| Case::new(dtype, &shape, &ranges, &order, &gaps))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn elements_land_at_their_strides_and_nothing_else_changes(case in case()) {
        let directory = directory();
        prop_assert!(case.is_read(&directory.path().join("file")));
    }
}

#[test]
fn slices_of_many_tiles_are_read() {
    let directory = directory();
    let path = directory.path().join("file");
    let whole = |dtype, shape: &[u64], order: &[usize], gaps: &[u64]| {
        Case::new(dtype, shape, &all(shape), order, gaps)
    };
    for case in [
        // Transposed: square, with short rows, with long ones.
        whole(Dtype::F32, &[1000, 1100], &[1, 0], &[0, 0]),
        whole(Dtype::BF16, &[300_000, 5], &[1, 0], &[0, 7]),
        whole(Dtype::F32, &[5, 300_000], &[1, 0], &[0, 0]),
        whole(Dtype::U8, &[1500, 2000], &[1, 0], &[0, 1]),
        // Images whose channels come last.
        whole(Dtype::F32, &[3, 70, 60, 50], &[0, 2, 3, 1], &[0; 4]),
        // A column block, with rows of more and of less than a page.
        whole(Dtype::F32, &[500, 1500], &[0, 1], &[0, 300]),
        whole(Dtype::F32, &[3000, 500], &[0, 1], &[0, 300]),
        // One row of elements that are apart.
        whole(Dtype::I64, &[300_000], &[0], &[1]),
        // Columns of rows that are near each other, or more than a page apart.
        Case::new(Dtype::F32, &[4000, 300], &[range(0, 4000, 1), range(7, 9, 1)], &[1, 0], &[0, 0]),
        Case::new(Dtype::U8, &[300, 9000], &[range(0, 300, 1), range(5000, 5003, 1)], &[0, 1], &[0, 9]),
        Case::new(Dtype::BF16, &[1000, 1000], &[range(1, 1000, 3), range(0, 999, 2)], &[0, 1], &[0, 0]),
    ] {
        assert!(case.is_read(&path), "{case:?}");
    }
}

#[test]
fn slices_with_and_without_strides_are_read_together() {
    let directory = directory();
    let path = directory.path().join("file");
    let shape = [600, 700];
    let case = Case::new(Dtype::F32, &shape, &all(&shape), &[1, 0], &[0, 0]);
    case.save(&path);
    let data = case.data();
    for backend in [Backend::Mmap, Backend::Pread] {
        let file = TensorFile::open(&path, backend).expect("opened");
        let parts = [range(0, 350, 1), range(350, 700, 1)].map(|columns| [range(0, 600, 1), columns]);
        let slices = parts.map(|ranges| file.slice(0, &ranges).expect("valid"));
        // Both halves of the columns of one destination, a transposed one, rows, and nothing.
        let (mut halves, mut transposed, mut rows) =
            (vec![0; data.len()], vec![0; data.len()], vec![0; 4 * 700]);
        let (whole, row) = (
            file.slice(0, &all(&shape)).expect("valid"),
            file.slice(0, &[range(9, 10, 1), range(0, 700, 1)]),
        );
        let (row, none) =
            (row.expect("valid"), file.slice(0, &[range(9, 9, 1), range(0, 700, 1)]).expect("valid"));
        let half = halves.len() - 4 * 350;
        let request = |slice, destination: *mut u8, nbytes, strides| SliceRequest {
            index: 0,
            slice,
            destination,
            nbytes,
            strides,
        };
        let first = halves.as_mut_ptr();
        let requests = [
            request(&slices[0], first, half, Some(&[700, 1])),
            request(&none, std::ptr::null_mut(), 0, Some(&[700, 1])),
            request(&slices[1], first.wrapping_add(4 * 350), half, Some(&[700, 1])),
            request(&whole, transposed.as_mut_ptr(), data.len(), Some(&case.strides)),
            request(&row, rows.as_mut_ptr(), rows.len(), None),
        ];
        // SAFETY: each destination is inside its buffer, and the elements of the two halves are different ones.
        unsafe { file.read_slices(&requests) }.expect("read");
        assert!(halves == data && transposed == case.expected() && rows == data[9 * 4 * 700..][..4 * 700]);
    }
}

/// Reads a slice of a tensor of shape 3 x 4 with these strides into so many bytes.
fn outcome(path: &Path, dtype: Dtype, nbytes: usize, strides: Option<&[u64]>) -> Result<Vec<u8>> {
    let file = TensorFile::open(path, Backend::Pread)?;
    let slice = Slice::plan("t", dtype, &[3, 4], &all(&[3, 4]))?;
    let mut bytes = vec![UNTOUCHED; nbytes];
    let request = SliceRequest { index: 0, slice: &slice, destination: bytes.as_mut_ptr(), nbytes, strides };
    // SAFETY: the buffer is valid for writes of its length, and nothing else refers to it.
    let outcome = unsafe { file.read_slices(&[request]) };
    assert!(outcome.is_ok() || bytes.iter().all(|&byte| byte == UNTOUCHED));
    outcome.map(|()| bytes)
}

#[test]
fn strides_that_do_not_fit_are_refused_before_anything_is_read() {
    let directory = directory();
    let path = directory.path().join("file");
    Case::new(Dtype::F32, &[3, 4], &all(&[3, 4]), &[0, 1], &[0, 0]).save(&path);
    let refused = |nbytes, strides: &[u64], kind, part: &str| {
        let outcome = outcome(&path, Dtype::F32, nbytes, Some(strides));
        assert_error(outcome, kind, directory.path(), &format!("tensor \"t\"{part}"));
    };
    for strides in [&[][..], &[4], &[12, 4, 1]] {
        let part = format!(": {} strides for 2 dimension(s)", strides.len());
        refused(1000, strides, ErrorKind::InvalidArgument, &part);
    }
    for strides in [[0, 1], [4, 0], [3, 1], [1, 2], [1, 1], [0, 0], [u64::MAX / 2, u64::MAX / 2]] {
        refused(1000, &strides, ErrorKind::InvalidArgument, ": elements of shape [3, 4] may share memory");
    }
    // Row-major, transposed, with gaps; then sizes that do not fit in 64 bits.
    for (strides, needed) in [([4, 1], 48), ([1, 3], 48), ([5, 1], 56), ([10, 3], 120)] {
        refused(needed - 1, &strides, ErrorKind::BufferSize, &format!(" takes {needed} bytes"));
        for nbytes in [needed, needed + 1] {
            assert!(outcome(&path, Dtype::F32, nbytes, Some(&strides)).is_ok(), "{strides:?}");
        }
    }
    let request = |file: &TensorFile, slice: &Slice, strides: &[u64]| {
        let (destination, nbytes) = (std::ptr::null_mut(), usize::MAX);
        let request = SliceRequest { index: 0, slice, destination, nbytes, strides: Some(strides) };
        // SAFETY: no memory is that large, so nothing is written.
        unsafe { file.read_slices(&[request]) }
    };
    let file = TensorFile::open(&path, Backend::Pread).expect("opened");
    let slice = file.slice(0, &all(&[3, 4])).expect("valid");
    assert_error(request(&file, &slice, &[1 << 61, 1]), ErrorKind::BufferSize, directory.path(), " takes");
    assert_error(request(&file, &slice, &[u64::MAX, 1]), ErrorKind::BufferSize, directory.path(), " takes");
    for strides in [[u64::MAX, 1], [u64::MAX / 8, 1], [1 << 62, 1], [1, 1 << 61], [4, u64::MAX]] {
        refused(1000, &strides, ErrorKind::BufferSize, " takes");
    }
    for nbytes in [47, 49] {
        let outcome = outcome(&path, Dtype::F32, nbytes, None);
        assert_error(outcome, ErrorKind::BufferSize, directory.path(), "tensor \"t\" takes 48 bytes");
    }
}

#[test]
fn elements_of_less_than_a_byte_are_row_major() {
    let directory = directory();
    let path = directory.path().join("file");
    let spec = TensorSpec { name: "t", dtype: Dtype::F4, shape: &[3, 4] };
    save_file(&[spec], &[&[1, 2, 3, 4, 5, 6]], None, &path, SaveOptions::default()).expect("saved");
    for strides in [None, Some(&[4, 1][..])] {
        assert_eq!(outcome(&path, Dtype::F4, 6, strides).expect("read"), [1, 2, 3, 4, 5, 6]);
    }
    let outcome_of = |nbytes, strides| outcome(&path, Dtype::F4, nbytes, Some(strides));
    let refused = "tensor \"t\": elements of F4 have 4 bits, and are read to row-major memory only";
    assert_error(outcome_of(100, &[1, 3]), ErrorKind::InvalidArgument, directory.path(), refused);
    assert_error(outcome_of(100, &[8, 1]), ErrorKind::InvalidArgument, directory.path(), refused);
    assert_error(
        outcome_of(5, &[4, 1]),
        ErrorKind::BufferSize,
        directory.path(),
        "tensor \"t\" takes 6 bytes",
    );
}

#[test]
fn a_slice_of_another_tensor_is_not_read_beyond_the_source() {
    let directory = directory();
    let path = directory.path().join("file");
    Case::new(Dtype::F32, &[3, 4], &all(&[3, 4]), &[0, 1], &[0, 0]).save(&path);
    let file = TensorFile::open(&path, Backend::Mmap).expect("opened");
    let larger = Case::new(Dtype::F32, &[60, 70], &all(&[60, 70]), &[1, 0], &[0, 0]);
    let slice = Slice::plan("t", Dtype::F32, &larger.shape, &larger.ranges).expect("valid");
    let mut bytes = larger.expected();
    for strides in [None, Some(&larger.strides[..])] {
        let (destination, nbytes) = (bytes.as_mut_ptr(), bytes.len());
        let request = SliceRequest { index: 0, slice: &slice, destination, nbytes, strides };
        // SAFETY: the buffer is valid for writes of its length, and nothing else refers to it.
        let outcome = unsafe { file.read_slices(&[request]) };
        assert_error(outcome, ErrorKind::FileChanged, &path, "a range is outside the source");
    }
}

#[test]
fn the_error_of_a_strided_read_names_the_tensor() {
    let directory = directory();
    let path = directory.path().join("file");
    let case = Case::new(Dtype::F32, &[600, 700], &all(&[600, 700]), &[1, 0], &[0, 0]);
    case.save(&path);
    for backend in [Backend::Mmap, Backend::Pread] {
        let file = TensorFile::open(&path, backend).expect("opened");
        let opened = std::fs::OpenOptions::new().write(true).open(&path).expect("opened");
        let length = opened.metadata().expect("metadata").len();
        opened.set_len(length / 2).expect("shortened");
        let outcome = case.read(&file, &mut vec![0; case.data().len()]);
        assert_error(outcome, ErrorKind::FileChanged, &path, "the bytes were for tensor \"t\"");
        opened.set_len(length).expect("extended");
    }
}
