//! Statistics of the values of tensors, in one pass. Parts are merged.

mod block;
mod histogram;
mod summary;
mod sums;
mod values;

pub use histogram::{HISTOGRAM_BINS, Histogram};
pub use summary::Statistics;

#[cfg(test)]
mod tests {
    use super::sums::Sums;
    use super::*;
    use crate::format::dtype::Dtype;
    use proptest::prelude::*;

    const WIDE: [Dtype; 11] = [
        Dtype::BF16,
        Dtype::F16,
        Dtype::F32,
        Dtype::C64,
        Dtype::F64,
        Dtype::I16,
        Dtype::U16,
        Dtype::I32,
        Dtype::U32,
        Dtype::I64,
        Dtype::U64,
    ];

    fn of(dtype: Dtype, bytes: &[u8]) -> (Statistics, Histogram) {
        let (mut statistics, mut histogram) = (Statistics::default(), Histogram::default());
        statistics.add(dtype, bytes, Some(&mut histogram));
        (statistics, histogram)
    }

    fn of_doubles(values: &[f64]) -> (Statistics, Histogram) {
        of(Dtype::F64, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Doubles of any magnitude, and others that are close to each other.
    fn doubles() -> impl Strategy<Value = Vec<f64>> {
        let near = (any::<f32>(), -30..30i32)
            .prop_map(|(value, exponent)| f64::from(value).clamp(-1e3, 1e3) + f64::from(exponent) * 1e-9);
        prop_oneof![
            prop::collection::vec(prop::num::f64::ANY, 0..3000),
            prop::collection::vec(near, 0..3000),
            prop::collection::vec(
                prop_oneof![Just(0.0), Just(-0.0), Just(5e-324), Just(-5e-324), Just(1.0)],
                0..50
            ),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn doubles_are_counted_exactly(values in doubles()) {
            let (found, histogram) = of_doubles(&values);
            let finite: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
            prop_assert_eq!(found.count, values.len() as u64);
            prop_assert_eq!(found.zeros, values.iter().filter(|&&value| value == 0.0).count() as u64);
            prop_assert_eq!(found.nans, values.iter().filter(|value| value.is_nan()).count() as u64);
            prop_assert_eq!(found.finite(), finite.len() as u64);
            prop_assert_eq!(histogram.counts().iter().sum::<u64>(), finite.len() as u64);
            prop_assert!(found.mean.is_finite());
            if finite.is_empty() {
                prop_assert_eq!(histogram.counts().len(), 0);
                return Ok(());
            }
            prop_assert_eq!(found.minimum, finite.iter().copied().fold(f64::INFINITY, f64::min));
            prop_assert_eq!(found.maximum, finite.iter().copied().fold(f64::NEG_INFINITY, f64::max));
            let end = |bin: usize| (histogram.first() + bin as i64) as f64 * histogram.width();
            for (bin, &count) in histogram.counts().iter().enumerate() {
                let inside = finite.iter().filter(|&&value| value >= end(bin) && value < end(bin + 1)).count();
                prop_assert_eq!(count, inside as u64, "{}", bin);
            }
            let counts = histogram.counts();
            prop_assert!(counts[0] > 0 && counts[counts.len() - 1] > 0);
        }

        #[test]
        fn histograms_do_not_depend_on_the_order(values in doubles(), split in any::<prop::sample::Index>()) {
            let (whole, histogram) = of_doubles(&values);
            let (left, right) = values.split_at(split.index(values.len() + 1));
            for (first, second) in [(left, right), (right, left)] {
                let ((mut sums, mut bins), (other, more)) = (of_doubles(first), of_doubles(second));
                sums.merge(&other);
                bins.merge(&more);
                prop_assert_eq!(&bins, &histogram);
                prop_assert_eq!(
                    (sums.count, sums.zeros, sums.nans, sums.infinities, sums.minimum, sums.maximum),
                    (whole.count, whole.zeros, whole.nans, whole.infinities, whole.minimum, whole.maximum)
                );
                let again = Histogram::from_parts(bins.first(), bins.width(), bins.counts());
                prop_assert_eq!(again.as_ref(), Some(&histogram));
            }
        }

        #[test]
        fn mean_and_deviations_are_those_of_two_passes(
            values in prop::collection::vec(-1e3..1e3f64, 2..5000),
            offset in prop_oneof![Just(0.0), -1e9..1e9f64],
        ) {
            let values: Vec<f64> = values.iter().map(|value| value + offset).collect();
            let (found, _) = of_doubles(&values);
            let count = values.len() as f64;
            // Around one of the values, so that the sums are exact enough.
            let mean = values[0] + values.iter().map(|value| value - values[0]).sum::<f64>() / count;
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            let scale = values.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
            prop_assert!((found.mean - mean).abs() <= 1e-14 * scale, "{} {}", found.mean, mean);
            let off = (found.squared_deviations - squares).abs();
            prop_assert!(off <= 1e-9 * squares + count * (1e-14 * scale).powi(2), "{} {squares}", found.squared_deviations);
        }

        #[test]
        fn every_processor_gets_the_same_bits(words in prop::collection::vec(any::<u64>(), 0..3000)) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            for dtype in WIDE {
                let (mut statistics, mut histogram) = (Statistics::default(), Histogram::default());
                let mut sums = Sums { statistics: Statistics::default(), histogram: Some(&mut histogram) };
                values::visit_portably(dtype, &bytes, &mut sums);
                statistics.merge(&sums.statistics);
                prop_assert_eq!(of(dtype, &bytes), (statistics, histogram), "{}", dtype);
            }
        }
    }

    #[test]
    fn equal_values_do_not_deviate() {
        for value in [0.1, -1e300, 5e-324] {
            let (found, histogram) = of_doubles(&[value; 3001]);
            assert_eq!((found.mean, found.squared_deviations), (value, 0.0));
            assert_eq!(histogram.counts(), [3001]);
        }
    }

    #[test]
    fn huge_doubles_have_a_finite_mean() {
        let (found, histogram) = of_doubles(&[f64::MAX, f64::MIN, f64::MAX, f64::MAX]);
        assert!((found.mean / (f64::MAX / 2.0) - 1.0).abs() < 1e-12, "{}", found.mean);
        assert_eq!(found.squared_deviations, f64::INFINITY);
        assert_eq!((histogram.counts()[0], histogram.counts().iter().sum::<u64>()), (1, 4));
        let (mut left, _) = of_doubles(&[f64::MAX; 2]);
        left.merge(&of_doubles(&[f64::MIN; 2]).0);
        assert_eq!((left.mean, left.squared_deviations), (0.0, f64::INFINITY));
    }

    #[test]
    fn unsound_histograms_are_refused() {
        for (first, width, bins) in [
            (0, 3.0, 1),
            (0, 0.0, 1),
            (0, -1.0, 1),
            (0, f64::NAN, 1),
            (0, f64::INFINITY, 1),
            (0, 5e-324, 1),
            (0, 1.0, HISTOGRAM_BINS + 1),
            (i64::MAX, 1.0, 1),
            (i64::MAX, 1.0, 2),
            (i64::MIN, 1.0, 1),
            (1 << 49, 2f64.powi(1000), 1),
        ] {
            assert_eq!(Histogram::from_parts(first, width, &vec![1; bins]), None, "{first} {width} {bins}");
        }
    }
}
