//! Stage `compressed`: attention to the compressed keys whose whole window has passed.

use std::ops::Range;

/// Compressed keys that a row at `position` sees: `i * s + l - 1 <= position`.
#[inline]
pub(crate) fn visible(position: usize, kernel_size: usize, kernel_stride: usize) -> Range<usize> {
    0..(position + 1).checked_sub(kernel_size).map_or(0, |rest| rest / kernel_stride + 1)
}
