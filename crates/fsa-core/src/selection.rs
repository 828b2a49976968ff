//! The contract of `topk_indices` `[num_kv_heads, total_q, topk]` (i32).
//!
//! A row lists block ids local to its own sequence. Any i32 is safe: an id that is negative, beyond
//! the row's own block or beyond the last block counts as absent. Ids must be unique in a row; that,
//! and that ids are in range, is checked by [`validate`] when a caller asks for it.

use crate::batch::Batch;
use crate::error::{Error, Result, ensure};
use crate::tensor::{Strided, TensorView};

/// Checks the shape of `topk_indices` and returns typed access.
pub fn check<'a>(topk_indices: &TensorView<'a>, num_kv_heads: usize, total_q: usize) -> Result<Strided<'a, i32>> {
    let shape = topk_indices.shape();
    ensure(
        shape.len() == 3 && shape[0] == num_kv_heads && shape[1] == total_q,
        "topk_indices",
        || format!("shape [{num_kv_heads}, {total_q}, topk]"),
        || format!("shape {shape:?}"),
    )?;
    topk_indices.typed::<i32>("topk_indices")
}

/// The block that `id` names for a row at `position`, or `None` if it counts as absent.
#[inline]
pub fn resolve(id: i32, position: usize, block_size: usize) -> Option<usize> {
    // The own block is the last that exists for the row: keys after `position` are in the future.
    usize::try_from(id).ok().filter(|block| *block <= position / block_size)
}

/// Full check: every id is -1 or a block of the row's past, and no id occurs twice in a row.
pub fn validate(topk_indices: &Strided<'_, i32>, batch: &Batch, block_size: usize) -> Result<()> {
    let (heads, topk) = (topk_indices.shape()[0], topk_indices.shape()[2]);
    let mut sorted = Vec::with_capacity(topk);
    for head in 0..heads {
        for sequence in batch.sequences() {
            for (t, row) in sequence.query_rows.clone().enumerate() {
                let own = (sequence.first_position + t) / block_size;
                sorted.clear();
                sorted.extend((0..topk).map(|slot| topk_indices.at(&[head, row, slot])));
                let place = |id: i32| format!("{id} in row [{head}, {row}]");
                if let Some(id) = sorted.iter().find(|id| **id < -1 || **id > own as i32) {
                    let expected = format!("-1 or a block id in 0..={own} (the row's own block)");
                    return Err(Error::input("topk_indices", expected, place(*id)));
                }
                sorted.retain(|id| *id >= 0);
                sorted.sort_unstable();
                if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                    let got = format!("block {} twice", place(pair[0]));
                    return Err(Error::input("topk_indices", "ids that are unique in a row", got));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_rows(rows: &[i32]) -> Result<()> {
        let shape = [1, rows.len() / 2, 2];
        let view = TensorView::new("topk_indices", rows, &shape)?;
        validate(&check(&view, 1, shape[1])?, &Batch::single(shape[1]), 16)
    }

    #[test]
    fn any_integer_resolves_to_a_block_of_the_past_or_to_none() {
        for id in [i32::MIN, -2, -1, 4, 5, 1 << 20, i32::MAX] {
            assert_eq!(resolve(id, 63, 16), None, "{id}");
        }
        assert_eq!(resolve(3, 63, 16), Some(3));
        assert_eq!(resolve(3, 47, 16), None);
    }

    #[test]
    fn validation_names_the_row_and_the_id() {
        let mut rows = vec![-1i32; 40 * 2];
        assert!(check_rows(&rows).is_ok());
        (rows[34 * 2], rows[34 * 2 + 1]) = (2, 1);
        assert!(check_rows(&rows).is_ok());
        for (id, text) in [(3, "3 in row [0, 34]"), (-2, "-2 in row [0, 34]"), (1, "block 1 in row [0, 34] twice")] {
            rows[34 * 2] = id;
            let error = check_rows(&rows).expect_err(text);
            assert!(error.to_string().contains(text), "{error}");
            assert_eq!(error.argument(), Some("topk_indices"));
        }
    }
}
