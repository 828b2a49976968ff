//! Descriptions of tensors for Hopper's bulk copy engine.

use super::{Address, check};
use crate::error::Result;
use cudarc::driver::sys;

/// The driver's description of a tensor, opaque and 128 bytes; zeros are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(64))]
pub(crate) struct MapWords([u64; 16]);

/// Columns of a box: a 128-byte line of 16-bit elements, the unit of the swizzle.
const BOX_COLUMNS: u32 = 64;

/// A `[tokens, heads, head_dim]` tensor of 16-bit elements, and the boxes that are copied of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boxes {
    pub data: Address,
    /// Tokens, heads, elements of a row.
    pub shape: [usize; 3],
    /// Bytes between tokens and between heads, multiples of 16.
    pub stride_bytes: [usize; 2],
    /// Tokens and heads of a box: at most 256 each.
    pub extent: [usize; 2],
    /// Of so many tokens of a box the first is copied: at most 8.
    pub token_step: usize,
    pub is_bf16: bool,
}

impl MapWords {
    /// The map of a tensor; none of an empty one, of which nothing is copied.
    pub(crate) fn new(boxes: &Boxes) -> Result<Self> {
        let Boxes { data, shape: [tokens, heads, columns], stride_bytes, extent, token_step, is_bf16 } = *boxes;
        let mut words = Self::default();
        if tokens == 0 || heads == 0 {
            return Ok(words);
        }
        let dtype = sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        let bf16 = sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        let sizes = [columns as u64, heads as u64, tokens as u64];
        let strides = [stride_bytes[1] as u64, stride_bytes[0] as u64];
        let extents = [BOX_COLUMNS, extent[1] as u32, extent[0] as u32];
        let steps = [1, 1, token_step as u32];
        // SAFETY: the map is 128 bytes at a multiple of 64; the arrays have as many elements as the rank says; the driver checks
        // the values and only stores the address.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                std::ptr::from_mut(&mut words).cast(),
                if is_bf16 { bf16 } else { dtype },
                3,
                data.0 as usize as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                extents.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", status)?;
        Ok(words)
    }
}
