//! Slices: a plan selects the bits of the elements picked one by one, or is refused if they do not fill whole bytes.

use std::collections::HashSet;

use arbitrary::{Result, Unstructured};
use safetensors_torch::{
    AxisRange, Dtype, ErrorKind, Layout, Slice, SliceRequest, TensorFile, TensorSpec, save_into,
};

/// The largest number of elements to pick one by one.
const MAX_ELEMENTS: u64 = 4096;

/// The largest destination with strides.
const MAX_DESTINATION: u128 = 1 << 20;

/// A tensor and the ranges of a slice.
#[derive(Debug)]
struct Input {
    dtype: Dtype,
    shape: Vec<u64>,
    ranges: Vec<AxisRange>,
    /// The bounds of a part of the slice's bytes, in 255ths.
    part: (u8, u8),
    /// Those of a destination.
    strides: Vec<u64>,
}

/// Runs the target on a tensor and ranges derived from `bytes`.
pub fn run(bytes: &[u8]) {
    if let Ok(input) = input(&mut Unstructured::new(bytes)) {
        check(&input);
    }
}

fn input(u: &mut Unstructured<'_>) -> Result<Input> {
    let dtype = *u.choose(Dtype::ALL)?;
    let part = u.arbitrary()?;
    let mut shape = Vec::new();
    let mut ranges = Vec::new();
    for _ in 0..u.int_in_range(0..=6)? {
        let dim = match u.int_in_range(0..=31)? {
            // The largest that a header can declare.
            31 => u.arbitrary::<u64>()? >> u.int_in_range(1..=63)?,
            small => small % 13,
        };
        shape.push(dim);
        ranges.push(range(u, dim)?);
    }
    match u.int_in_range(0..=63)? {
        62 => drop(ranges.pop()),
        63 => ranges.push(range(u, 1)?),
        _ => {}
    }
    let strides = strides(u, &ranges)?;
    Ok(Input { dtype, shape, ranges, part, strides })
}

/// Returns strides for a slice: usually those of its dimensions in any order, with gaps, otherwise any small ones.
fn strides(u: &mut Unstructured<'_>, ranges: &[AxisRange]) -> Result<Vec<u64>> {
    let mut order = ranges.iter().map(|_| u.arbitrary()).collect::<Result<Vec<u8>>>()?;
    if u.ratio(1, 4)? {
        return Ok(order.iter().map(|&key| u64::from(key % 32)).collect());
    }
    let (mut strides, mut extent) = (vec![0; ranges.len()], 1u64);
    while let Some(axis) =
        (0..order.len()).filter(|&axis| order[axis] < u8::MAX).min_by_key(|&axis| order[axis])
    {
        order[axis] = u8::MAX;
        strides[axis] = extent.saturating_add(u.int_in_range(0..=3)?);
        // The range may be an invalid one.
        let last = if ranges[axis].step == 0 { 0 } else { ranges[axis].len().saturating_sub(1) };
        extent = extent.saturating_add(strides[axis].saturating_mul(last));
    }
    Ok(strides)
}

/// Returns a range of a dimension of size `dim`, usually a valid one.
fn range(u: &mut Unstructured<'_>, dim: u64) -> Result<AxisRange> {
    if u.ratio(1, 64)? {
        return Ok(AxisRange { start: u.arbitrary()?, stop: u.arbitrary()?, step: u.arbitrary()? });
    }
    let (a, b) = (u.int_in_range(0..=dim)?, u.int_in_range(0..=dim)?);
    let step = if u.ratio(1, 32)? { u.arbitrary()? } else { u.int_in_range(1..=4)? };
    Ok(AxisRange { start: a.min(b), stop: a.max(b), step })
}

fn check(input: &Input) {
    let Input { dtype, shape, ranges, part, strides } = input;
    let spec = TensorSpec { name: "t", dtype: *dtype, shape };
    // Only tensors that a header may declare have slices.
    let Ok(layout) = Layout::plan(&[spec], None, 8) else { return };
    let fits = ranges.len() == shape.len()
        && ranges.iter().zip(shape).all(|(r, &dim)| r.step > 0 && r.start <= r.stop && r.stop <= dim);
    let planned = Slice::plan("t", *dtype, shape, ranges);
    if !fits {
        assert_eq!(planned.expect_err("ranges that do not fit").kind(), ErrorKind::Slice, "{input:?}");
        return;
    }
    let lengths: Vec<u64> = ranges.iter().map(length).collect();
    if let Ok(slice) = &planned {
        assert_eq!(slice.shape(), lengths, "{input:?}");
        let elements: u128 = lengths.iter().map(|&length| u128::from(length)).product();
        assert_eq!(u128::from(slice.nbytes()) * 8, elements * u128::from(dtype.bits()), "{input:?}");
        // Checks only the first and the last runs of a very large slice.
        let size = layout.total_bytes() - layout.header().len() as u64;
        let edge = slice.nbytes().min(64);
        for bytes in [0..edge, slice.nbytes() - edge..slice.nbytes()] {
            let runs = slice.byte_ranges_of(bytes).take(65);
            assert!(runs.into_iter().all(|run| run.start < run.end && run.end <= size), "{input:?}");
        }
    }
    // Skips large shapes, even if a dimension of 0 makes the tensor empty.
    if shape.iter().map(|&dim| u128::from(dim.max(1))).product::<u128>() > MAX_ELEMENTS.into() {
        return;
    }
    let expected = picked_bytes(&picked_bits(*dtype, shape, ranges));
    match (planned, expected) {
        (Ok(slice), Some(expected)) => {
            let all: Vec<u64> = slice.byte_ranges().flatten().collect();
            assert_eq!(all, expected, "{input:?}");
            let byte_at = |share: u8| expected.len() * usize::from(share) / 255;
            let (from, to) = (byte_at(part.0.min(part.1)), byte_at(part.0.max(part.1)));
            let some: Vec<u64> = slice.byte_ranges_of(from as u64..to as u64).flatten().collect();
            assert_eq!(some, expected[from..to], "{input:?}");
            check_read(&layout, spec, &slice, &expected, strides);
        }
        (Err(error), None) => assert_eq!(error.kind(), ErrorKind::Slice, "{input:?}"),
        (planned, expected) => panic!("{input:?}: the plan is {planned:?}, the model {expected:?}"),
    }
}

/// Reads the slice from a file in memory, without and with strides.
fn check_read(layout: &Layout, spec: TensorSpec<'_>, slice: &Slice, expected: &[u64], strides: &[u64]) {
    let size = layout.total_bytes() as usize - layout.header().len();
    let data: Vec<u8> =
        (0..size).map(|index| (index as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let mut bytes = vec![0; layout.total_bytes() as usize];
    save_into(&[spec], &[&data], None, &mut bytes, 8).expect("a tensor");
    // SAFETY: the bytes outlive the file, and are not written to.
    let file = unsafe { TensorFile::from_memory(bytes.as_ptr(), bytes.len()) }.expect("a file");
    let picked: Vec<u8> = expected.iter().map(|&index| data[index as usize]).collect();
    let mut read = vec![0; picked.len()];
    // SAFETY: the buffer has that length, and nothing else refers to it.
    unsafe { file.read_slice(0, slice, read.as_mut_ptr(), read.len()) }.expect("in memory");
    assert!(read == picked);
    check_strided_read(&file, spec.dtype, slice, &picked, strides);
}

/// Reads the slice to a destination with these strides, or checks that they are refused with reason.
fn check_strided_read(file: &TensorFile, dtype: Dtype, slice: &Slice, picked: &[u8], strides: &[u64]) {
    let places = places(slice.shape(), strides);
    let item = dtype.bits() as usize / 8;
    let needed = places.iter().max().map_or(0, |last| (last + 1) * item.max(1) as u128);
    if needed > MAX_DESTINATION {
        return;
    }
    let mut read = vec![0xAA; needed as usize];
    let (destination, nbytes) = (read.as_mut_ptr(), read.len());
    let request = SliceRequest { index: 0, slice, destination, nbytes, strides: Some(strides) };
    // SAFETY: the buffer has that length, and nothing else refers to it.
    match unsafe { file.read_slices(&[request]) } {
        Ok(()) if item == 0 => assert!(places.iter().copied().eq(0..places.len() as u128)),
        Ok(()) => {
            assert!(HashSet::<&u128>::from_iter(&places).len() == places.len(), "elements share memory");
            let mut model = vec![0xAA; read.len()];
            for (element, &place) in picked.chunks(item).zip(&places) {
                model[place as usize * item..][..item].copy_from_slice(element);
            }
            assert!(read == model);
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(item == 0 || !are_nested(slice.shape(), strides), "{error}");
            assert!(read.iter().all(|&byte| byte == 0xAA));
        }
    }
}

/// Returns the place of each element of a destination, in elements.
fn places(shape: &[u64], strides: &[u64]) -> Vec<u128> {
    let mut places = vec![0];
    for (&dim, &stride) in shape.iter().zip(strides) {
        let steps = move |place: &u128| {
            let place = *place;
            (0..dim).map(move |index| place + u128::from(index) * u128::from(stride))
        };
        places = places.iter().flat_map(steps).collect();
    }
    places
}

/// Returns whether each dimension steps over those with smaller strides.
fn are_nested(shape: &[u64], strides: &[u64]) -> bool {
    let dimensions = || shape.iter().zip(strides).enumerate().filter(|(_, (dim, _))| **dim > 1);
    dimensions().all(|(axis, (_, &stride))| {
        let inner = dimensions().filter(|&(other, (_, &smaller))| (smaller, other) < (stride, axis));
        stride > inner.map(|(_, (dim, smaller))| (dim - 1) * smaller).sum::<u64>()
    })
}

fn length(range: &AxisRange) -> u64 {
    u128::from(range.stop - range.start).div_ceil(range.step.into()) as u64
}

/// Returns the position in the tensor of each bit of a slice, element by element.
fn picked_bits(dtype: Dtype, shape: &[u64], ranges: &[AxisRange]) -> Vec<u64> {
    let mut elements = vec![0];
    for (range, dim) in ranges.iter().zip(shape) {
        let indices: Vec<u64> = (range.start..range.stop).step_by(range.step as usize).collect();
        elements = elements
            .iter()
            .flat_map(|element| indices.iter().map(move |index| element * dim + index))
            .collect();
    }
    elements.iter().flat_map(|element| element * dtype.bits()..(element + 1) * dtype.bits()).collect()
}

/// Returns the bytes of these bits, or `None` if they do not fill whole bytes.
fn picked_bytes(bits: &[u64]) -> Option<Vec<u64>> {
    let byte_of = |byte: &[u64]| {
        let first = byte[0];
        (byte.len() == 8 && first.is_multiple_of(8) && byte.iter().copied().eq(first..first + 8))
            .then_some(first / 8)
    };
    bits.chunks(8).map(byte_of).collect()
}
