//! Stage `window`: attention to a sliding window of earlier keys.

use std::ops::Range;

/// Keys that a row at `position` sees: `window_size` earlier ones and its own.
#[inline]
pub(crate) fn visible(position: usize, window_size: usize) -> Range<usize> {
    position.saturating_sub(window_size)..position + 1
}
