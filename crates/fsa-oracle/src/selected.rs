//! Stage `selected`: a row sees the keys at or before its position whose block it lists.

use crate::attention::Place;
use fsa_core::Strided;

/// Keys `j <= position` whose block `floor(j / block_size)` the row lists. An id that names no block of the past
/// matches no key, whatever it is; an id that occurs twice changes nothing.
pub fn visible_keys(place: &Place<'_>, topk_indices: &Strided<'_, i32>, block_size: usize) -> Vec<usize> {
    let listed: Vec<i32> =
        (0..topk_indices.shape()[2]).map(|slot| topk_indices.at(&[place.kv_head, place.row, slot])).collect();
    let kv = &place.sequence.kv_rows;
    let lists = |key: usize| listed.iter().any(|id| *id >= 0 && *id as usize == key / block_size);
    kv.clone().filter(|row| row - kv.start <= place.position && lists(row - kv.start)).collect()
}
