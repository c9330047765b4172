//! The element types of the format: their codes, their widths and their order in a file.

use std::ffi::CStr;
use std::fmt;

macro_rules! dtypes {
    ($( $(#[$doc:meta])* $variant:ident = $number:literal, $code:literal, $bits:literal; )*) => {
        /// An element type.
        ///
        /// The discriminant is the number in the C ABI and never changes. It differs from [`Dtype::layout_rank`], the
        /// order of tensors in a file.
        ///
        /// ```
        /// use safetensors_torch::Dtype;
        ///
        /// let dtype = Dtype::from_code("BF16").expect("a code of the format");
        /// assert_eq!((dtype, dtype.bits()), (Dtype::BF16, 16));
        /// ```
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Dtype {
            $( $(#[$doc])* $variant = $number, )*
        }

        impl Dtype {
            /// Every dtype, in the order of tensors in a file.
            pub const ALL: &'static [Dtype] = &[ $( Dtype::$variant, )* ];

            /// Returns the code in the header, such as `F32`.
            pub const fn code(self) -> &'static str {
                match self { $( Dtype::$variant => $code, )* }
            }

            pub(crate) const fn c_code(self) -> &'static CStr {
                let bytes = match self { $( Dtype::$variant => concat!($code, "\0").as_bytes(), )* };
                match CStr::from_bytes_with_nul(bytes) {
                    Ok(code) => code,
                    Err(_) => panic!("a code contains NUL"),
                }
            }

            /// Returns the width of one element in bits: 4, 6, or a multiple of 8.
            pub const fn bits(self) -> u64 {
                match self { $( Dtype::$variant => $bits, )* }
            }

            /// Returns the dtype of a header code, or `None` if the format does not define the code.
            pub fn from_code(code: &str) -> Option<Dtype> {
                match code { $( $code => Some(Dtype::$variant), )* _ => None }
            }

            /// Returns the dtype of a C ABI number, or `None` if no dtype has the number.
            pub const fn from_number(number: u32) -> Option<Dtype> {
                match number { $( $number => Some(Dtype::$variant), )* _ => None }
            }
        }
    };
}

// In file order: the strictest alignment comes first.
dtypes! {
    /// Unsigned 64-bit integer.
    U64 = 21, "U64", 64;
    /// Signed 64-bit integer.
    I64 = 20, "I64", 64;
    /// IEEE 754 binary64.
    F64 = 19, "F64", 64;
    /// Two F32: real, imaginary.
    C64 = 18, "C64", 64;
    /// IEEE 754 binary32.
    F32 = 17, "F32", 32;
    /// Unsigned 32-bit integer.
    U32 = 16, "U32", 32;
    /// Signed 32-bit integer.
    I32 = 15, "I32", 32;
    /// bfloat16: the upper half of an F32.
    BF16 = 14, "BF16", 16;
    /// IEEE 754 binary16.
    F16 = 13, "F16", 16;
    /// Unsigned 16-bit integer.
    U16 = 12, "U16", 16;
    /// Signed 16-bit integer.
    I16 = 11, "I16", 16;
    /// 8-bit float, 5 exponent bits, no negative zero, no infinities.
    F8E5M2FNUZ = 10, "F8_E5M2FNUZ", 8;
    /// 8-bit float, 4 exponent bits, no negative zero, no infinities.
    F8E4M3FNUZ = 9, "F8_E4M3FNUZ", 8;
    /// 8-bit exponent without sign or mantissa: a scale.
    F8E8M0 = 8, "F8_E8M0", 8;
    /// 8-bit float, 4 exponent bits, no infinities (torch's `float8_e4m3fn`).
    F8E4M3 = 7, "F8_E4M3", 8;
    /// 8-bit float, 5 exponent bits.
    F8E5M2 = 6, "F8_E5M2", 8;
    /// Signed 8-bit integer.
    I8 = 5, "I8", 8;
    /// Unsigned 8-bit integer.
    U8 = 4, "U8", 8;
    /// 6-bit float, 3 exponent bits.
    F6E3M2 = 3, "F6_E3M2", 6;
    /// 6-bit float, 2 exponent bits.
    F6E2M3 = 2, "F6_E2M3", 6;
    /// 4-bit float, 2 exponent bits; two to a byte.
    F4 = 1, "F4", 4;
    /// One byte, 0 or 1.
    Bool = 0, "BOOL", 8;
}

impl Dtype {
    /// Returns the position of this dtype in a file: tensors of a smaller rank come first.
    pub const fn layout_rank(self) -> usize {
        /// The rank of each dtype, by number.
        const RANKS: [usize; Dtype::ALL.len()] = {
            let mut ranks = [0; Dtype::ALL.len()];
            let mut rank = 0;
            while rank < ranks.len() {
                ranks[Dtype::ALL[rank] as usize] = rank;
                rank += 1;
            }
            ranks
        };
        RANKS[self as usize]
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}
