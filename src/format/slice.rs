//! The byte ranges of a tensor that a slice needs.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;
use crate::format::runs::{Loop, Runs};
use crate::format::strides;

/// The indices that a slice selects in one dimension: `start`, `start + step`, ... below `stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AxisRange {
    /// The first index.
    pub start: u64,
    /// The exclusive end; at most the size of the dimension.
    pub stop: u64,
    /// The distance between two indices, 1 or more.
    pub step: u64,
}

impl AxisRange {
    /// Returns the number of indices.
    pub fn len(&self) -> u64 {
        self.stop.saturating_sub(self.start).div_ceil(self.step)
    }

    /// Returns whether the range has no index.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A validated slice of a tensor: its shape, and its bytes as runs of equal length.
///
/// ```
/// # fn main() -> safetensors_torch::Result<()> {
/// use safetensors_torch::{AxisRange, Dtype, Slice};
///
/// let columns = [AxisRange { start: 0, stop: 2, step: 1 }, AxisRange { start: 1, stop: 3, step: 1 }];
/// let slice = Slice::plan("weight", Dtype::U8, &[2, 4], &columns)?;
/// assert_eq!(slice.shape(), [2, 2]);
/// assert!(slice.byte_ranges().eq([1..3, 5..7]));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Slice {
    dtype: Dtype,
    shape: Vec<u64>,
    /// The distances between neighbouring elements of the slice in the tensor, in bits; 0 in a dimension of size 1.
    stride_bits: Vec<u64>,
    /// The byte offset of the first run in the tensor.
    first: u64,
    runs: Runs<1>,
}

impl Slice {
    /// Plans a slice of a tensor of `dtype` and `shape` with one range per dimension. `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Slice`] if the number of ranges is wrong, or a range exceeds its dimension, has step 0, or splits a byte.
    pub fn plan(name: &str, dtype: Dtype, shape: &[u64], ranges: &[AxisRange]) -> Result<Slice> {
        let refuse = |what: String| Error::new(ErrorKind::Slice, format!("slice of tensor {name:?}: {what}"));
        if ranges.len() != shape.len() {
            return Err(refuse(format!("{} ranges for {} dimension(s)", ranges.len(), shape.len())));
        }
        for (axis, (range, &dim)) in ranges.iter().zip(shape).enumerate() {
            if range.step == 0 {
                return Err(refuse(format!("the step of dimension {axis} must be 1 or more")));
            }
            if range.start > range.stop || range.stop > dim {
                let AxisRange { start, stop, .. } = range;
                return Err(refuse(format!("{start}..{stop} is not within dimension {axis} of size {dim}")));
            }
        }
        let result: Vec<u64> = ranges.iter().map(AxisRange::len).collect();
        if result.contains(&0) {
            let (stride_bits, empty) = (vec![0; result.len()], Loop { count: 0, strides: [0] });
            let runs = Runs { length: 0, loops: vec![empty] };
            return Ok(Slice { dtype, shape: result, stride_bits, first: 0, runs });
        }
        // The bits of a validated shape fit in 63 bits, so nothing below can overflow.
        let (mut first_bits, mut tensor_bits) = (0, dtype.bits());
        let mut stride_bits = vec![0; ranges.len()];
        for (axis, (range, &dim)) in ranges.iter().zip(shape).enumerate().rev() {
            first_bits += range.start * tensor_bits;
            if result[axis] > 1 {
                stride_bits[axis] = range.step * tensor_bits;
            }
            tensor_bits *= dim;
        }
        let loops =
            result.iter().zip(&stride_bits).map(|(&count, &stride)| Loop { count, strides: [stride] });
        let mut runs = Runs::merge(dtype.bits(), loops);
        let splits_byte = |bits: u64| !bits.is_multiple_of(8);
        if splits_byte(runs.length)
            || splits_byte(first_bits)
            || runs.loops.iter().any(|around| splits_byte(around.strides[0]))
        {
            return Err(refuse(format!(
                "elements of {dtype} have {} bits, and this slice begins or ends in the middle of a byte; use an \
                 even start and an even length in the last dimension",
                dtype.bits()
            )));
        }
        runs.length /= 8;
        for around in &mut runs.loops {
            around.strides[0] /= 8;
        }
        Ok(Slice { dtype, shape: result, stride_bits, first: first_bits / 8, runs })
    }

    /// Returns the dimensions of the slice in elements; it has all dimensions of the tensor.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Returns the size of the slice in bytes.
    pub fn nbytes(&self) -> u64 {
        self.runs.total()
    }

    /// Returns the byte ranges in the tensor, in the order of the elements of the slice.
    pub fn byte_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.byte_ranges_of(0..self.nbytes())
    }

    /// Returns the byte ranges in the tensor for `bytes` of the slice, which must not exceed [`Slice::nbytes`].
    pub fn byte_ranges_of(&self, bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let size = self.runs.length.max(1);
        let runs = if bytes.is_empty() { 0..0 } else { bytes.start / size..bytes.end.div_ceil(size) };
        runs.map(move |run| {
            let begin = self.first + self.runs.offsets(run)[0];
            // `bytes` may begin and end inside a run.
            let from = bytes.start.saturating_sub(run * size);
            let to = (bytes.end - run * size).min(size);
            begin + from..begin + to
        })
    }

    /// Returns the byte offset of the first run in the tensor.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// Checks that each element has memory of its own in a destination with `strides`, in elements. Returns the bytes from its
    /// first element to its last. `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] if the number of strides is wrong, elements might share memory, or elements of less than
    /// a byte are not row-major.
    pub(crate) fn check_strides(&self, name: &str, strides: &[u64]) -> Result<u64> {
        let Slice { dtype, shape, .. } = self;
        let refuse = |what: String| {
            Err(Error::new(ErrorKind::InvalidArgument, format!("slice of tensor {name:?}: {what}")))
        };
        if strides.len() != shape.len() {
            return refuse(format!("{} strides for {} dimension(s)", strides.len(), shape.len()));
        }
        if !strides::are_nested(shape, strides) {
            return refuse(format!(
                "elements of shape {shape:?} may share memory with the strides {strides:?}; each stride must step over \
                 all elements of the dimensions with smaller ones"
            ));
        }
        if dtype.bits().is_multiple_of(8) {
            return Ok(strides::extent(shape, strides).saturating_mul(dtype.bits() / 8));
        }
        if !strides::are_row_major(shape, strides) {
            return refuse(format!(
                "elements of {dtype} have {} bits, and are read to row-major memory only; leave out the strides",
                dtype.bits()
            ));
        }
        Ok(self.nbytes())
    }

    /// Returns the runs that are contiguous both in the tensor and in a destination, which is row-major or has `strides` that
    /// [`Slice::check_strides`] has accepted for memory that exists. The first strides of their loops are those in the tensor.
    pub(crate) fn runs_to(&self, strides: Option<&[u64]>) -> Runs<2> {
        let item = self.dtype.bits() / 8;
        let Some(strides) = strides.filter(|_| self.dtype.bits().is_multiple_of(8) && self.nbytes() > 0)
        else {
            return self.runs.beside_packed();
        };
        let dimensions = self.shape.iter().zip(self.stride_bits.iter().zip(strides));
        // A dimension of size 1 may have any stride.
        let loops = dimensions.filter(|&(&count, _)| count > 1).map(|(&count, (&bits, &stride))| {
            let strides = [bits / 8, stride * item];
            Loop { count, strides }
        });
        Runs::merge(item, loops)
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    fn range(start: u64, stop: u64, step: u64) -> AxisRange {
        AxisRange { start, stop, step }
    }

    fn ranges(dtype: Dtype, shape: &[u64], axes: &[AxisRange]) -> Vec<Range<u64>> {
        Slice::plan("t", dtype, shape, axes).expect("valid").byte_ranges().collect()
    }

    #[test]
    fn whole_tensor_is_one_run() {
        assert_eq!(ranges(Dtype::F32, &[2, 3], &[range(0, 2, 1), range(0, 3, 1)]), [0..24]);
        assert_eq!(ranges(Dtype::F32, &[], &[]), [0..4]);
    }

    #[test]
    fn adjacent_rows_are_one_run_and_columns_are_not() {
        assert_eq!(ranges(Dtype::U8, &[4, 3], &[range(1, 3, 1), range(0, 3, 1)]), [3..9]);
        assert_eq!(ranges(Dtype::U8, &[2, 4], &[range(0, 2, 1), range(1, 3, 1)]), [1..3, 5..7]);
        assert_eq!(ranges(Dtype::U8, &[2, 4], &[range(0, 2, 1), range(0, 4, 2)]), [0..1, 2..3, 4..5, 6..7]);
        assert_eq!(ranges(Dtype::U16, &[5, 2], &[range(0, 5, 3), range(0, 2, 1)]), [0..4, 12..16]);
    }

    #[test]
    fn ranges_of_some_bytes_are_part_of_all_ranges() {
        let axes = [range(0, 3, 2), range(1, 4, 1), range(0, 3, 1)];
        let slice = Slice::plan("t", Dtype::U16, &[3, 5, 3], &axes).expect("valid");
        let bytes = |ranges: Vec<Range<u64>>| ranges.into_iter().flatten().collect::<Vec<u64>>();
        let all = bytes(slice.byte_ranges().collect());
        assert_eq!(all.len(), 36);
        for from in 0..36 {
            for to in from..=36 {
                let part: Vec<_> = slice.byte_ranges_of(from..to).collect();
                assert!(part.iter().all(|run| !run.is_empty()));
                assert_eq!(bytes(part), all[from as usize..to as usize], "{from}..{to}");
            }
        }
    }

    #[test]
    fn runs_are_contiguous_on_both_sides() {
        let slice =
            |dtype, shape: &[u64], axes: &[AxisRange]| Slice::plan("t", dtype, shape, axes).expect("valid");
        let runs = |length, loops: &[(u64, [u64; 2])]| {
            let loops = loops.iter().map(|&(count, strides)| Loop { count, strides }).collect();
            Runs { length, loops }
        };
        let whole = slice(Dtype::F32, &[2, 3, 5], &[range(0, 2, 1), range(0, 3, 1), range(0, 5, 1)]);
        assert_eq!(whole.runs_to(None), runs(120, &[]));
        assert_eq!(whole.runs_to(Some(&[15, 5, 1])), runs(120, &[]));
        assert_eq!(whole.runs_to(Some(&[20, 5, 1])), runs(60, &[(2, [60, 80])]));
        assert_eq!(whole.runs_to(Some(&[18, 6, 1])), runs(20, &[(6, [20, 24])]));
        assert_eq!(whole.runs_to(Some(&[1, 10, 2])), runs(4, &[(2, [60, 4]), (15, [4, 8])]));
        let part = slice(Dtype::U8, &[4, 6], &[range(1, 4, 2), range(2, 4, 1)]);
        assert_eq!(part.runs_to(None), runs(2, &[(2, [12, 2])]));
        assert_eq!(part.runs_to(Some(&[1, 2])), runs(1, &[(2, [12, 1]), (2, [1, 2])]));
        let one = slice(Dtype::I64, &[3, 4], &[range(1, 2, 9), range(0, 4, 1)]);
        assert_eq!(one.runs_to(Some(&[u64::MAX, 1])), runs(32, &[]));
        let packed = slice(Dtype::F4, &[2, 4], &[range(0, 2, 1), range(0, 2, 1)]);
        assert_eq!(packed.runs_to(Some(&[2, 1])), runs(1, &[(2, [2, 1])]));
        let empty = slice(Dtype::I64, &[3, 4], &[range(1, 1, 1), range(0, 4, 1)]);
        assert_eq!((empty.runs_to(None).count(), empty.runs_to(Some(&[0, 0])).count()), (0, 0));
    }
}
