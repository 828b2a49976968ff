//! Stage `window`: a row sees its own key and the `window_size` before it.

use crate::attention::Place;

/// Keys `max(0, position - window_size) ..= position`.
pub fn visible_keys(place: &Place<'_>, window_size: usize) -> Vec<usize> {
    let kv = &place.sequence.kv_rows;
    let sees = |key: usize| key <= place.position && place.position - key <= window_size;
    kv.clone().filter(|row| sees(row - kv.start)).collect()
}
