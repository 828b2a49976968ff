//! Stage `index`: the inverse index of a selection, for every block the rows that chose it.
//!
//! Compressed sparse rows, built by two passes over `topk_indices` (count, then fill in row order), so
//! that the rows of a block are ascending and the result is the same on every machine. Ids that
//! [`crate::selection::resolve`] rejects do not enter.

use crate::batch::Sequence;
use crate::selection::resolve;
use crate::tensor::Strided;
use std::ops::Range;

/// Rows of one kv head and one range of query rows, by block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InverseIndex {
    offsets: Vec<usize>,
    rows: Vec<u32>,
}

impl InverseIndex {
    /// Builds the index of `kv_head` for the rows `rows` (local to `sequence`), reusing this
    /// object's memory. Rows are stored relative to `rows.start`.
    pub fn build(
        &mut self,
        topk_indices: &Strided<'_, i32>,
        kv_head: usize,
        sequence: &Sequence,
        rows: Range<usize>,
        block_size: usize,
    ) {
        let topk = topk_indices.shape()[2];
        let last = sequence.first_position + rows.end;
        let num_blocks = last.div_ceil(block_size).min(sequence.num_blocks(block_size));
        let for_each = |visit: &mut dyn FnMut(usize, u32)| {
            for t in rows.clone() {
                let (row, position) = (sequence.query_rows.start + t, sequence.first_position + t);
                for slot in 0..topk {
                    if let Some(block) = resolve(topk_indices.at(&[kv_head, row, slot]), position, block_size) {
                        visit(block, (t - rows.start) as u32);
                    }
                }
            }
        };
        self.offsets.clear();
        self.offsets.resize(num_blocks + 1, 0);
        for_each(&mut |block, _| self.offsets[block + 1] += 1);
        for block in 0..num_blocks {
            self.offsets[block + 1] += self.offsets[block];
        }
        self.rows.clear();
        self.rows.resize(self.offsets[num_blocks], 0);
        // Filling moves each block's start to its end; the shift afterwards restores the starts.
        for_each(&mut |block, row| {
            self.rows[self.offsets[block]] = row;
            self.offsets[block] += 1;
        });
        self.offsets.copy_within(0..num_blocks, 1);
        self.offsets[0] = 0;
    }

    /// Number of blocks that any of the rows can see.
    pub fn num_blocks(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// The rows that chose `block`, ascending.
    pub fn rows(&self, block: usize) -> &[u32] {
        &self.rows[self.offsets[block]..self.offsets[block + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::TensorView;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_index_holds_exactly_the_valid_pairs(
            ids in proptest::collection::vec(-3i32..9, 40 * 3), extra in 0usize..30, start in 0usize..40, len in 0usize..40,
        ) {
            let rows = start..(start + len).min(40);
            let sequence = Sequence { query_rows: 0..40, kv_rows: 0..40 + extra, first_position: extra };
            let view = TensorView::new("topk_indices", &ids, &[1, 40, 3]).expect("shape");
            let typed = view.typed::<i32>("topk_indices").expect("i32");
            let mut index = InverseIndex::default();
            index.build(&typed, 0, &sequence, rows.clone(), 16);
            let mut expected = Vec::new();
            for block in 0..index.num_blocks() {
                for t in rows.clone() {
                    let times = ids[t * 3..t * 3 + 3].iter().filter(|id| **id == block as i32).count();
                    if block <= (t + extra) / 16 {
                        expected.extend(std::iter::repeat_n((block, (t - rows.start) as u32), times));
                    }
                }
            }
            let got: Vec<_> = (0..index.num_blocks()).flat_map(|b| index.rows(b).iter().map(move |r| (b, *r))).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
