//! Collects the values of one part of a tensor.

use super::block::{self, BLOCK, Value};
use super::histogram::Histogram;
use super::summary::Statistics;

/// The number of codes of a byte.
pub(super) const CODES: usize = 256;

/// The statistics of the values, and the histogram that they are added to.
pub(super) struct Sums<'a> {
    pub(super) statistics: Statistics,
    pub(super) histogram: Option<&'a mut Histogram>,
}

impl Sums<'_> {
    /// Adds at most [`BLOCK`] values.
    #[inline(always)]
    pub(super) fn add_block<T: Value>(&mut self, values: &[T]) {
        if let Some(block) = block::summarize(values) {
            return self.add_finite(values, &block);
        }
        let mut finite = [T::default(); BLOCK];
        let (mut count, mut nans) = (0, 0);
        for &value in values {
            finite[count] = value;
            count += usize::from(value.is_finite());
            nans += u64::from(value.is_nan());
        }
        let finite = &finite[..count];
        self.statistics.nans += nans;
        self.statistics.infinities += (values.len() - count) as u64 - nans;
        self.statistics.count += (values.len() - count) as u64;
        let block = block::summarize(finite).unwrap_or_else(|| block::summarize_huge(finite));
        self.add_finite(finite, &block);
    }

    #[inline(always)]
    fn add_finite<T: Value>(&mut self, values: &[T], block: &Statistics) {
        self.statistics.merge(block);
        if let Some(histogram) = self.histogram.as_deref_mut()
            && !values.is_empty()
        {
            histogram.add_block(values, block.minimum, block.maximum);
        }
    }

    /// Adds `counts[code]` times the value of each code.
    pub(super) fn add_counts(&mut self, values: &[f64; CODES], counts: &[u64; CODES]) {
        let mut all =
            Statistics { minimum: f64::INFINITY, maximum: f64::NEG_INFINITY, ..Statistics::default() };
        let present = values.iter().copied().zip(counts.iter().copied()).filter(|&(_, count)| count > 0);
        let mut sum = 0.0;
        for (value, count) in present.clone() {
            all.count += count;
            if value.is_nan() {
                all.nans += count;
            } else if value.is_infinite() {
                all.infinities += count;
            } else {
                all.zeros += if value == 0.0 { count } else { 0 };
                all.minimum = all.minimum.min(value);
                all.maximum = all.maximum.max(value);
                sum += value * count as f64;
            }
        }
        if all.finite() == 0 {
            (all.minimum, all.maximum) = (0.0, 0.0);
            return self.statistics.merge(&all);
        }
        all.mean = sum / all.finite() as f64;
        for (value, count) in present.filter(|(value, _)| value.is_finite()) {
            let deviation = value - all.mean;
            all.squared_deviations += deviation * deviation * count as f64;
            if let Some(histogram) = self.histogram.as_deref_mut() {
                histogram.add_value(value, count);
            }
        }
        self.statistics.merge(&all);
    }
}
