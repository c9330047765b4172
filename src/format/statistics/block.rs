//! Sums of one block of values, which the processor's first cache holds.

use super::summary::Statistics;

/// The most values of a block.
pub(super) const BLOCK: usize = 1024;

/// The sums that are kept side by side, for vector instructions. A constant, so that every processor rounds alike.
const LANES: usize = 8;

/// A type that values are decoded to.
pub(super) trait Value: Copy + Default + PartialOrd + Into<f64> {
    fn is_finite(self) -> bool;
    fn is_nan(self) -> bool;
}

impl Value for f32 {
    fn is_finite(self) -> bool {
        self.is_finite()
    }
    fn is_nan(self) -> bool {
        self.is_nan()
    }
}

impl Value for f64 {
    fn is_finite(self) -> bool {
        self.is_finite()
    }
    fn is_nan(self) -> bool {
        self.is_nan()
    }
}

fn lesser<T: Value>(a: T, b: T) -> T {
    if b < a { b } else { a }
}

fn greater<T: Value>(a: T, b: T) -> T {
    if b > a { b } else { a }
}

struct Lanes<T> {
    sums: [f64; LANES],
    squares: [f64; LANES],
    least: [T; LANES],
    greatest: [T; LANES],
    zeros: [u32; LANES],
}

impl<T: Value> Lanes<T> {
    #[inline(always)]
    fn add(&mut self, values: &[T; LANES], shift: f64) {
        for (lane, &value) in values.iter().enumerate() {
            let difference = value.into() - shift;
            self.sums[lane] += difference;
            self.squares[lane] += difference * difference;
            self.least[lane] = lesser(self.least[lane], value);
            self.greatest[lane] = greater(self.greatest[lane], value);
            self.zeros[lane] += u32::from(value == T::default());
        }
    }
}

/// Returns the statistics of at most [`BLOCK`] finite values. Returns `None` if one is not finite, or if the squares exceed a
/// double.
///
/// Sums are those of the differences from the first value. That one deviates from the mean too, so the sum of squares is at
/// most n + 1 times the sum of squared deviations, and the subtraction loses no more than the logarithm of that in bits.
#[inline(always)]
pub(super) fn summarize<T: Value>(values: &[T]) -> Option<Statistics> {
    let &[first, ..] = values else { return Some(Statistics::default()) };
    let shift = first.into();
    let mut lanes = Lanes {
        sums: [0.0; LANES],
        squares: [0.0; LANES],
        least: [first; LANES],
        greatest: [first; LANES],
        zeros: [0; LANES],
    };
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.add(chunk, shift);
    }
    let mut zeros: u32 = lanes.zeros.iter().sum();
    if !rest.is_empty() {
        // More copies of the first value add nothing to the sums.
        let mut chunk = [first; LANES];
        chunk[..rest.len()].copy_from_slice(rest);
        lanes.add(&chunk, shift);
        zeros += rest.iter().map(|&value| u32::from(value == T::default())).sum::<u32>();
    }
    let (sum, squares): (f64, f64) = (lanes.sums.iter().sum(), lanes.squares.iter().sum());
    // One that is not finite makes the squares infinite, or no number.
    squares.is_finite().then(|| Statistics {
        minimum: lanes.least.into_iter().fold(first, lesser).into(),
        maximum: lanes.greatest.into_iter().fold(first, greater).into(),
        mean: shift + sum / values.len() as f64,
        squared_deviations: (squares - sum * (sum / values.len() as f64)).max(0.0),
        ..counts(values.len(), zeros)
    })
}

/// As [`summarize`], for finite values whose squares exceed a double.
#[cold]
pub(super) fn summarize_huge<T: Value>(values: &[T]) -> Statistics {
    let as_doubles = || values.iter().map(|&value| value.into());
    let zeros = as_doubles().filter(|&value| value == 0.0).count();
    Statistics {
        minimum: as_doubles().fold(f64::INFINITY, f64::min),
        maximum: as_doubles().fold(f64::NEG_INFINITY, f64::max),
        // A sum of halves of the mean does not exceed a double.
        mean: as_doubles().map(|value| value / values.len() as f64).sum(),
        squared_deviations: f64::INFINITY,
        ..counts(values.len(), zeros as u32)
    }
}

fn counts(count: usize, zeros: u32) -> Statistics {
    Statistics { count: count as u64, zeros: zeros.into(), ..Statistics::default() }
}
