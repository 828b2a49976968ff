//! Stage `compressed`: a row sees the compressed keys whose whole window lies at or before its position.

use crate::attention::Place;

/// Compressed keys i of the row's sequence with `i * kernel_stride + kernel_size - 1 <= position`. `offsets` holds
/// the first compressed row of every sequence, and the total.
pub fn visible_keys(place: &Place<'_>, offsets: &[usize], kernel_size: usize, kernel_stride: usize) -> Vec<usize> {
    let first = offsets[place.number];
    let last_of_window = |i: usize| i * kernel_stride + kernel_size - 1;
    (first..offsets[place.number + 1]).filter(|row| last_of_window(row - first) <= place.position).collect()
}
