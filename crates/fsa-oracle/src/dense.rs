//! Stage `dense`: a row sees every key at or before its position.

use crate::attention::Place;

/// Keys `0 ..= position`.
pub fn visible_keys(place: &Place<'_>) -> Vec<usize> {
    let kv = &place.sequence.kv_rows;
    kv.clone().filter(|row| row - kv.start <= place.position).collect()
}
