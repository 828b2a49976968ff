//! Element types and their conversion to the f32 in which every sum is taken.

use crate::tensor::{Slice, SliceMut, Storage};
use half::{bf16, f16};
use std::fmt;

/// Type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// 32-bit signed integer (indices, prefix sums).
    I32,
}

impl DType {
    /// The floating-point types that the stages compute with.
    pub const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    /// Size of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }

    /// Distance from 1 to the next larger value: 2^-23, 2^-7, 2^-10; 0 for integers.
    pub fn epsilon(self) -> f64 {
        match self {
            DType::F32 => f64::from(f32::EPSILON),
            DType::Bf16 => f64::from(bf16::EPSILON.to_f32()),
            DType::F16 => f64::from(f16::EPSILON.to_f32()),
            DType::I32 => 0.0,
        }
    }

    /// True for the types that hold real numbers.
    pub const fn is_float(self) -> bool {
        !matches!(self, DType::I32)
    }

    /// Lower-case name: `f32`, `bf16`, `f16`, `i32`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = crate::Error;
    fn from_str(s: &str) -> crate::Result<Self> {
        [DType::F32, DType::Bf16, DType::F16, DType::I32]
            .into_iter()
            .find(|d| d.name() == s)
            .ok_or_else(|| crate::Error::input("dtype", "one of f32, bf16, f16, i32", s))
    }
}

/// A type that a tensor can hold.
pub trait Element: Copy + Default + Send + Sync + fmt::Debug + PartialEq + 'static {
    /// Its tag.
    const DTYPE: DType;
    /// Exact widening (floats), numeric conversion (integers).
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Wraps a borrowed slice.
    fn slice(data: &[Self]) -> Slice<'_>;
    /// Wraps a mutably borrowed slice.
    fn slice_mut(data: &mut [Self]) -> SliceMut<'_>;
    /// Wraps an owned vector.
    fn storage(data: Vec<Self>) -> Storage;
    /// The slice, if the tag matches.
    fn unslice<'a>(slice: &Slice<'a>) -> Option<&'a [Self]>;
    /// The slice, if the tag matches.
    fn unslice_mut<'a>(slice: &'a mut SliceMut<'_>) -> Option<&'a mut [Self]>;
    /// Widens a run of elements; a backend's vectorised conversion goes through here.
    fn widen(source: &[Self], target: &mut [f32]) {
        for (t, s) in target.iter_mut().zip(source) {
            *t = s.to_f32();
        }
    }
    /// Rounds a run of elements.
    fn narrow(source: &[f32], target: &mut [Self]) {
        for (t, s) in target.iter_mut().zip(source) {
            *t = Self::from_f32(*s);
        }
    }
}

macro_rules! element {
    ($type:ty, $variant:ident, $to:expr, $from:expr $(, $widen:item, $narrow:item)?) => {
        impl Element for $type {
            const DTYPE: DType = DType::$variant;
            #[inline(always)]
            fn to_f32(self) -> f32 {
                ($to)(self)
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                ($from)(value)
            }
            fn slice(data: &[Self]) -> Slice<'_> {
                Slice::$variant(data)
            }
            fn slice_mut(data: &mut [Self]) -> SliceMut<'_> {
                SliceMut::$variant(data)
            }
            fn storage(data: Vec<Self>) -> Storage {
                Storage::$variant(data)
            }
            fn unslice<'a>(slice: &Slice<'a>) -> Option<&'a [Self]> {
                if let Slice::$variant(data) = slice { Some(data) } else { None }
            }
            fn unslice_mut<'a>(slice: &'a mut SliceMut<'_>) -> Option<&'a mut [Self]> {
                if let SliceMut::$variant(data) = slice { Some(data) } else { None }
            }
            $($widen $narrow)?
        }
    };
}

element!(f32, F32, |v| v, |v| v);
element!(i32, I32, |v| v as f32, |v: f32| v as i32);
// bf16 widens by a shift, which the compiler vectorises; `half`'s own slice conversion is used for
// f16, where the hardware has an instruction for eight at a time.
element!(bf16, Bf16, |v: bf16| f32::from_bits(u32::from(v.to_bits()) << 16), bf16::from_f32);
element!(
    f16,
    F16,
    f16::to_f32,
    f16::from_f32,
    fn widen(source: &[Self], target: &mut [f32]) {
        use half::slice::HalfFloatSliceExt;
        source.convert_to_f32_slice(&mut target[..source.len()]);
    },
    fn narrow(source: &[f32], target: &mut [Self]) {
        use half::slice::HalfFloatSliceExt;
        target.convert_from_f32_slice(&source[..target.len()]);
    }
);
