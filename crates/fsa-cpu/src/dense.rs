//! Stage `dense`: causal attention to every earlier key. The yardstick, on the same tiles and kernels.

use std::ops::Range;

/// Keys that a row at `position` sees.
#[inline]
pub(crate) fn visible(position: usize) -> Range<usize> {
    0..position + 1
}
