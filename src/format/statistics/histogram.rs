//! Histograms that need no second pass: the bins double whenever a value falls outside.

use super::block::{BLOCK, Value};

/// The most bins of a histogram.
pub const HISTOGRAM_BINS: usize = 128;

/// The least exponent of a width, so that the inverse is a double.
const LEAST_EXPONENT: i32 = -1022;

/// Places of values are below 2 to this power.
const PLACE_BITS: i32 = 50;

/// How many finite values lie in each of up to [`HISTOGRAM_BINS`] intervals.
///
/// The width is the least power of two with which the bins reach from the least value to the greatest, and each begins at a
/// multiple of it. So two neighbours become one bin of the double width, counts stay exact, and the result depends on the
/// values alone, not on their order. More than half of the bins are used, unless the values are too close to each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// The base-2 logarithm of the width.
    exponent: i32,
    /// The place of the first bin: its beginning, divided by the width.
    first: i64,
    /// The number of bins from the least value to the greatest; 0 if there are no values.
    bins: usize,
    counts: [u64; HISTOGRAM_BINS],
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { exponent: LEAST_EXPONENT, first: 0, bins: 0, counts: [0; HISTOGRAM_BINS] }
    }
}

impl Histogram {
    /// Returns the width of each bin, a power of two.
    pub fn width(&self) -> f64 {
        power_of_two(self.exponent)
    }

    /// Returns where the first bin begins, in widths from zero.
    pub fn first(&self) -> i64 {
        self.first
    }

    /// Returns the number of values in each bin, from that of the least value to that of the greatest.
    pub fn counts(&self) -> &[u64] {
        &self.counts[..self.bins]
    }

    /// Returns the histogram with these results of its functions, or `None` if no histogram has them.
    pub(crate) fn from_parts(first: i64, width: f64, counts: &[u64]) -> Option<Histogram> {
        let mut histogram = Histogram::default();
        let Some(others) = counts.len().checked_sub(1) else { return Some(histogram) };
        let (exponent, last) = (exponent_of(width), first.checked_add(others as i64)?);
        let magnitude = first.unsigned_abs().max(last.unsigned_abs());
        let is_sound = others < HISTOGRAM_BINS
            && exponent >= LEAST_EXPONENT
            && width == power_of_two(exponent)
            && magnitude <= 1 << PLACE_BITS
            // A quarter, because the bins of the greatest doubles may end beyond them.
            && magnitude as f64 / 4.0 * width <= power_of_two(1022);
        if !is_sound {
            return None;
        }
        (histogram.exponent, histogram.first, histogram.bins) = (exponent, first, counts.len());
        histogram.counts[..counts.len()].copy_from_slice(counts);
        Some(histogram)
    }

    /// Adds the values that `other` counts.
    pub fn merge(&mut self, other: &Histogram) {
        let Some(last) = other.bins.checked_sub(1) else { return };
        self.extend(other.exponent, other.first, other.first + last as i64);
        for (place, &count) in (other.first..).zip(other.counts()) {
            self.counts[((place >> (self.exponent - other.exponent).min(63)) - self.first) as usize] += count;
        }
    }

    /// Adds `count` times a finite value.
    pub(super) fn add_value(&mut self, value: f64, count: u64) {
        self.extend_to(value, value);
        self.counts[(place(value, self.exponent) - self.first) as usize] += count;
    }

    /// Adds at most [`BLOCK`] finite values. `least` and `greatest` are the least and the greatest of them.
    #[inline(always)]
    pub(super) fn add_block<T: Value>(&mut self, values: &[T], least: f64, greatest: f64) {
        self.extend_to(least, greatest);
        let mut bins = [0u8; BLOCK];
        for (bin, &value) in bins.iter_mut().zip(values) {
            *bin = (place(value.into(), self.exponent) - self.first) as u8;
        }
        // Several counters of a bin: one that is incremented again at once would wait for its own store.
        let mut counts = [[0u32; HISTOGRAM_BINS]; 4];
        let (words, rest) = bins[..values.len()].as_chunks::<4>();
        for word in words {
            for (counts, &bin) in counts.iter_mut().zip(word) {
                counts[usize::from(bin) % HISTOGRAM_BINS] += 1;
            }
        }
        for &bin in rest {
            counts[0][usize::from(bin) % HISTOGRAM_BINS] += 1;
        }
        for (bin, total) in self.counts.iter_mut().enumerate() {
            *total += counts.iter().map(|counts| u64::from(counts[bin])).sum::<u64>();
        }
    }

    /// Makes the bins reach from `least` to `greatest`.
    fn extend_to(&mut self, least: f64, greatest: f64) {
        // Halves, because the difference may exceed a double.
        let span = exponent_of(greatest / 2.0 - least / 2.0) + 1;
        let magnitude = exponent_of(least.abs().max(greatest.abs()));
        // With the first of these widths, the bins would be more than twice too many.
        let mut exponent = (span - 8).max(magnitude + 1 - PLACE_BITS).max(LEAST_EXPONENT);
        while place(greatest, exponent) - place(least, exponent) >= HISTOGRAM_BINS as i64 {
            exponent += 1;
        }
        self.extend(exponent, place(least, exponent), place(greatest, exponent));
    }

    /// Makes the bins reach from the place `first` to the place `last`, of width `exponent`.
    fn extend(&mut self, exponent: i32, first: i64, last: i64) {
        let widest = self.exponent.max(exponent);
        let (mut first, mut last) =
            (first >> (widest - exponent).min(63), last >> (widest - exponent).min(63));
        let mut shift = (widest - self.exponent).min(63);
        if self.bins > 0 {
            let end = self.first + self.bins as i64 - 1;
            (first, last) = (first.min(self.first >> shift), last.max(end >> shift));
        }
        let mut wider = widest;
        while last - first >= HISTOGRAM_BINS as i64 {
            (wider, first, last) = (wider + 1, first >> 1, last >> 1);
        }
        if (wider, first) != (self.exponent, self.first) {
            shift = (wider - self.exponent).min(63);
            let mut counts = [0; HISTOGRAM_BINS];
            for (place, &count) in (self.first..).zip(self.counts()) {
                counts[((place >> shift) - first) as usize] += count;
            }
            (self.exponent, self.first, self.counts) = (wider, first, counts);
        }
        self.bins = (last - first) as usize + 1;
    }
}

/// Returns the exponent of a double's magnitude; -1023 for zero and subnormals.
fn exponent_of(value: f64) -> i32 {
    ((value.to_bits() >> 52) & 0x7ff) as i32 - 1023
}

/// Returns the greatest integer up to `value` divided by the width, whose logarithm is `exponent`.
#[inline(always)]
fn place(value: f64, exponent: i32) -> i64 {
    /// A double whose lowest bit is 1: adding it rounds to an integer, which is then in the bits.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let rounded = value * power_of_two(-exponent) + ROUND;
    let nearest = rounded.to_bits() as i64 - ROUND.to_bits() as i64;
    // Compared with the value, because the quotient of a small one may be rounded to zero.
    nearest - i64::from((rounded - ROUND) * power_of_two(exponent) > value)
}

/// Returns 2 to the power of `exponent`, from -1022 to 1023.
pub(super) const fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}
