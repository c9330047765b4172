//! The values of elements.

use super::block::{BLOCK, Value};
use super::histogram::{Histogram, power_of_two};
use super::summary::Statistics;
use super::sums::{CODES, Sums};
use crate::format::dtype::Dtype;

impl Statistics {
    /// Adds the elements of `dtype` in `bytes`, which must end where an element does, to these statistics and to `histogram`.
    pub(crate) fn add(&mut self, dtype: Dtype, bytes: &[u8], histogram: Option<&mut Histogram>) {
        let mut sums = Sums { statistics: Statistics::default(), histogram };
        visit(dtype, bytes, &mut sums);
        self.merge(&sums.statistics);
    }
}

/// Adds the elements of `dtype` in `bytes` to `sums`.
fn visit(dtype: Dtype, bytes: &[u8], sums: &mut Sums<'_>) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { visit_with_avx2(dtype, bytes, sums) };
    }
    visit_portably(dtype, bytes, sums);
}

/// Does the same with wider vectors, and rounds alike: the compiler keeps the order of operations.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn visit_with_avx2(dtype: Dtype, bytes: &[u8], sums: &mut Sums<'_>) {
    visit_portably(dtype, bytes, sums);
}

#[inline(always)]
pub(super) fn visit_portably(dtype: Dtype, bytes: &[u8], sums: &mut Sums<'_>) {
    match dtype {
        Dtype::BF16 => visit_wide(bytes, |e| f32::from_bits(u32::from(u16::from_le_bytes(e)) << 16), sums),
        Dtype::F16 => visit_wide(bytes, |e| half(u16::from_le_bytes(e)), sums),
        Dtype::F32 | Dtype::C64 => visit_wide(bytes, f32::from_le_bytes, sums),
        Dtype::F64 => visit_wide(bytes, f64::from_le_bytes, sums),
        Dtype::I16 => visit_wide(bytes, |e| f32::from(i16::from_le_bytes(e)), sums),
        Dtype::U16 => visit_wide(bytes, |e| f32::from(u16::from_le_bytes(e)), sums),
        Dtype::I32 => visit_wide(bytes, |e| f64::from(i32::from_le_bytes(e)), sums),
        Dtype::U32 => visit_wide(bytes, |e| f64::from(u32::from_le_bytes(e)), sums),
        Dtype::I64 => visit_wide(bytes, |e| i64::from_le_bytes(e) as f64, sums),
        Dtype::U64 => visit_wide(bytes, |e| u64::from_le_bytes(e) as f64, sums),
        Dtype::U8 | Dtype::I8 | Dtype::Bool | Dtype::F4 => visit_codes(dtype, bytes, sums),
        Dtype::F8E5M2 | Dtype::F8E4M3 | Dtype::F8E8M0 | Dtype::F8E5M2FNUZ | Dtype::F8E4M3FNUZ => {
            visit_codes(dtype, bytes, sums);
        }
        Dtype::F6E2M3 | Dtype::F6E3M2 => unreachable!("Statistics::supports has refused {dtype}"),
    }
}

#[inline(always)]
fn visit_wide<T: Value, const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> T, sums: &mut Sums<'_>) {
    let mut values = [T::default(); BLOCK];
    for elements in bytes.as_chunks::<N>().0.chunks(BLOCK) {
        for (value, &element) in values.iter_mut().zip(elements) {
            *value = decode(element);
        }
        sums.add_block(&values[..elements.len()]);
    }
}

/// Returns the value of an F16. Without branches, so that vector instructions can be used.
#[inline(always)]
fn half(bits: u16) -> f32 {
    /// The distance between the exponents of F32 and F16.
    const REBIAS: u32 = 127 - 15;
    let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff) << 13);
    let exponent = rest & 0x0f80_0000;
    let normal = rest + (REBIAS << 23);
    // One with the subnormal as its lowest bits, less the one.
    let subnormal =
        (f32::from_bits(rest + ((REBIAS + 1) << 23)) - f32::from_bits((REBIAS + 1) << 23)).to_bits();
    let magnitude = match exponent {
        0 => subnormal,
        0x0f80_0000 => normal + (REBIAS << 23),
        _ => normal,
    };
    f32::from_bits(sign | magnitude)
}

/// Adds elements of at most a byte: counts each code, then weights the values of the codes.
fn visit_codes(dtype: Dtype, bytes: &[u8], sums: &mut Sums<'_>) {
    // Several counters of a code: one that is incremented again at once would wait for its own store.
    let mut counts = [[0u64; CODES]; 4];
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        for (counts, &code) in counts.iter_mut().zip(word) {
            counts[usize::from(code)] += 1;
        }
    }
    for &code in rest {
        counts[0][usize::from(code)] += 1;
    }
    let counts: [u64; CODES] = std::array::from_fn(|code| counts.iter().map(|counts| counts[code]).sum());
    match dtype {
        Dtype::U8 => sums.add_counts(&const { table(Dtype::U8) }, &counts),
        Dtype::I8 => sums.add_counts(&const { table(Dtype::I8) }, &counts),
        Dtype::F8E5M2 => sums.add_counts(&const { table(Dtype::F8E5M2) }, &counts),
        Dtype::F8E4M3 => sums.add_counts(&const { table(Dtype::F8E4M3) }, &counts),
        Dtype::F8E8M0 => sums.add_counts(&const { table(Dtype::F8E8M0) }, &counts),
        Dtype::F8E5M2FNUZ => sums.add_counts(&const { table(Dtype::F8E5M2FNUZ) }, &counts),
        Dtype::F8E4M3FNUZ => sums.add_counts(&const { table(Dtype::F8E4M3FNUZ) }, &counts),
        Dtype::F4 => {
            let mut nibbles = [0; CODES];
            for (code, count) in counts.iter().enumerate() {
                nibbles[code & 15] += count;
                nibbles[code >> 4] += count;
            }
            sums.add_counts(&const { table(Dtype::F4) }, &nibbles);
        }
        // Every byte except 0 is true.
        _ => sums.add_counts(&const { table(Dtype::Bool) }, &counts),
    }
}

const fn table(dtype: Dtype) -> [f64; CODES] {
    let mut values = [0.0; CODES];
    let mut code = 0;
    while code < CODES {
        values[code] = value_of(dtype, code as u8);
        code += 1;
    }
    values
}

/// Returns the value of an element of at most a byte.
const fn value_of(dtype: Dtype, code: u8) -> f64 {
    match (dtype, code) {
        (Dtype::U8, _) => code as f64,
        (Dtype::I8, _) => code as i8 as f64,
        (Dtype::F8E8M0, 0xff) => f64::NAN,
        (Dtype::F8E8M0, _) => power_of_two(code as i32 - 127),
        (Dtype::F8E5M2, _) if code & 0x7f > 0x7c => f64::NAN,
        (Dtype::F8E5M2, 0x7c) => f64::INFINITY,
        (Dtype::F8E5M2, 0xfc) => f64::NEG_INFINITY,
        (Dtype::F8E5M2, _) => minifloat(code, 7, 2, 15),
        (Dtype::F8E4M3, 0x7f | 0xff) => f64::NAN,
        (Dtype::F8E4M3, _) => minifloat(code, 7, 3, 7),
        (Dtype::F8E5M2FNUZ | Dtype::F8E4M3FNUZ, 0x80) => f64::NAN,
        (Dtype::F8E5M2FNUZ, _) => minifloat(code, 7, 2, 16),
        (Dtype::F8E4M3FNUZ, _) => minifloat(code, 7, 3, 8),
        (Dtype::F4, _) => minifloat(code, 3, 1, 1),
        _ => (code != 0) as u8 as f64,
    }
}

/// Returns the value of a float whose sign is the bit `sign`, below it the exponent, and at the end `mantissa` bits.
const fn minifloat(code: u8, sign: u32, mantissa: u32, bias: i32) -> f64 {
    let fraction = code & ((1 << mantissa) - 1);
    let exponent = (code & ((1 << sign) - 1)) >> mantissa;
    // Subnormals have the exponent of the least normal numbers, without the leading one.
    let (whole, exponent) = if exponent == 0 { (fraction, 1) } else { (fraction | 1 << mantissa, exponent) };
    let magnitude = whole as f64 * power_of_two(exponent as i32 - bias - mantissa as i32);
    if code >> sign & 1 == 0 { magnitude } else { -magnitude }
}
