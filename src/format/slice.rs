//! The byte ranges of a tensor that a slice needs.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::format::dtype::Dtype;

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
    shape: Vec<u64>,
    run_bytes: u64,
    /// The byte offset of the first run in the tensor.
    first: u64,
    /// The loops around the runs, outermost first: count and stride in bytes.
    loops: Vec<(u64, u64)>,
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
            return Ok(Slice { shape: result, run_bytes: 0, first: 0, loops: vec![(0, 0)] });
        }
        // The bits of a validated shape fit in 63 bits, so nothing below can overflow.
        let mut loops = Vec::new();
        let (mut run_bits, mut first_bits, mut stride_bits) = (dtype.bits(), 0, dtype.bits());
        let mut contiguous = true;
        for (range, &dim) in ranges.iter().zip(shape).rev() {
            first_bits += range.start * stride_bits;
            let count = range.len();
            if contiguous && (range.step == 1 || count == 1) {
                run_bits *= count;
                contiguous = count == dim;
            } else if count > 1 {
                contiguous = false;
                loops.push((count, range.step * stride_bits));
            }
            stride_bits *= dim;
        }
        loops.reverse();
        let splits_byte = |bits: u64| !bits.is_multiple_of(8);
        if splits_byte(run_bits)
            || splits_byte(first_bits)
            || loops.iter().any(|&(_, bits)| splits_byte(bits))
        {
            return Err(refuse(format!(
                "elements of {dtype} have {} bits, and this slice begins or ends in the middle of a byte; use an \
                 even start and an even length in the last dimension",
                dtype.bits()
            )));
        }
        let loops = loops.into_iter().map(|(count, bits)| (count, bits / 8)).collect();
        Ok(Slice { shape: result, run_bytes: run_bits / 8, first: first_bits / 8, loops })
    }

    /// Returns the dimensions of the slice in elements; it has all dimensions of the tensor.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Returns the size of the slice in bytes.
    pub fn nbytes(&self) -> u64 {
        self.run_bytes * self.loops.iter().map(|&(count, _)| count).product::<u64>()
    }

    /// Returns whether the slice has several runs that are shorter than a page.
    pub(crate) fn has_short_runs(&self) -> bool {
        self.run_bytes < 4096 && self.nbytes() > self.run_bytes
    }

    /// Returns the byte ranges in the tensor, in the order of the elements of the slice.
    pub fn byte_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.byte_ranges_of(0..self.nbytes())
    }

    /// Returns the byte ranges in the tensor for `bytes` of the slice, which must not exceed [`Slice::nbytes`].
    pub fn byte_ranges_of(&self, bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let size = self.run_bytes.max(1);
        let runs = if bytes.is_empty() { 0..0 } else { bytes.start / size..bytes.end.div_ceil(size) };
        runs.map(move |run| {
            let mut rest = run;
            let mut begin = self.first;
            for &(count, stride) in self.loops.iter().rev() {
                begin += rest % count * stride;
                rest /= count;
            }
            // `bytes` may begin and end inside a run.
            let from = bytes.start.saturating_sub(run * size);
            let to = (bytes.end - run * size).min(size);
            begin + from..begin + to
        })
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
}
