//! How many values there are of each kind, and where the finite ones lie.

use crate::format::dtype::Dtype;

/// How many values there are of each kind, and where the finite ones lie. The default is that of no values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Statistics {
    /// All values: one for each element, two for each of [`Dtype::C64`].
    pub count: u64,
    /// The zeros of either sign.
    pub zeros: u64,
    /// The values that are not a number.
    pub nans: u64,
    /// The infinities of either sign.
    pub infinities: u64,
    /// The least finite value; 0 if there is none.
    pub minimum: f64,
    /// The greatest finite value; 0 if there is none.
    pub maximum: f64,
    /// The mean of the finite values; 0 if there is none.
    pub mean: f64,
    /// The sum of (value - mean) squared over the finite values. It is infinite beyond the range of a double.
    pub squared_deviations: f64,
}

impl Statistics {
    /// Returns whether the values of `dtype` are defined. The format does not say which bits of three bytes are the elements
    /// of 6-bit floats.
    pub const fn supports(dtype: Dtype) -> bool {
        !matches!(dtype, Dtype::F6E2M3 | Dtype::F6E3M2)
    }

    /// Returns the number of finite values.
    pub const fn finite(&self) -> u64 {
        self.count - self.nans - self.infinities
    }

    /// Returns the standard deviation of the finite values, with Bessel's correction, or `None` for fewer than two.
    pub fn standard_deviation(&self) -> Option<f64> {
        let others = self.finite().checked_sub(1).filter(|&others| others > 0)?;
        Some((self.squared_deviations / others as f64).sqrt())
    }

    /// Adds the values that `other` describes. The last bits of the result depend on the order of merges.
    pub fn merge(&mut self, other: &Statistics) {
        let (ours, theirs) = (self.finite() as f64, other.finite() as f64);
        self.count += other.count;
        self.zeros += other.zeros;
        self.nans += other.nans;
        self.infinities += other.infinities;
        if theirs == 0.0 {
            return;
        }
        if ours == 0.0 {
            self.minimum = other.minimum;
            self.maximum = other.maximum;
            self.mean = other.mean;
            self.squared_deviations = other.squared_deviations;
            return;
        }
        self.minimum = self.minimum.min(other.minimum);
        self.maximum = self.maximum.max(other.maximum);
        let (difference, all) = (other.mean - self.mean, ours + theirs);
        self.squared_deviations += other.squared_deviations + difference * difference * (ours * theirs / all);
        self.mean = if difference.is_finite() {
            self.mean + difference * (theirs / all)
        } else {
            self.mean * (ours / all) + other.mean * (theirs / all)
        };
    }
}
