//! Packed batches: sequences laid end to end, described by prefix sums.

use crate::error::{Error, Result, ensure};
use std::ops::Range;

/// One sequence of a packed batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Its rows in `query`.
    pub query_rows: Range<usize>,
    /// Its rows in `key` and `value`.
    pub kv_rows: Range<usize>,
    /// Position of its first query row: `kv_len - q_len` for a whole sequence (bottom-right causal).
    pub first_position: usize,
}

impl Sequence {
    /// Query rows.
    pub fn query_len(&self) -> usize {
        self.query_rows.len()
    }

    /// Keys.
    pub fn kv_len(&self) -> usize {
        self.kv_rows.len()
    }

    /// Number of blocks of `block_size` keys, the last perhaps partial.
    pub fn num_blocks(&self, block_size: usize) -> usize {
        self.kv_len().div_ceil(block_size)
    }

    /// Number of whole compression windows.
    pub fn num_compressed(&self, kernel_size: usize, kernel_stride: usize) -> usize {
        if self.kv_len() < kernel_size { 0 } else { (self.kv_len() - kernel_size) / kernel_stride + 1 }
    }
}

/// A packed batch, made from `cu_seqlens_q` and `cu_seqlens_kv`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    sequences: Vec<Sequence>,
    total_q: usize,
    total_kv: usize,
}

fn check_prefix_sums(argument: &str, sums: &[i32]) -> Result<usize> {
    ensure(!sums.is_empty(), argument, || "batch + 1 prefix sums".into(), || "no element".into())?;
    ensure(sums[0] == 0, argument, || "first element 0".into(), || sums[0].to_string())?;
    if let Some(i) = (1..sums.len()).find(|i| sums[*i] < sums[i - 1]) {
        return Err(Error::input(
            argument,
            "prefix sums that do not decrease",
            format!("{} after {} at index {i}", sums[i], sums[i - 1]),
        ));
    }
    Ok(sums[sums.len() - 1] as usize)
}

impl Batch {
    /// Builds and checks a batch: both arrays start at 0, never decrease, have one length, and no
    /// sequence has more query rows than keys. Sequences may be empty.
    pub fn from_cu_seqlens(cu_seqlens_q: &[i32], cu_seqlens_kv: &[i32]) -> Result<Self> {
        let total_q = check_prefix_sums("cu_seqlens_q", cu_seqlens_q)?;
        let total_kv = check_prefix_sums("cu_seqlens_kv", cu_seqlens_kv)?;
        ensure(
            cu_seqlens_q.len() == cu_seqlens_kv.len(),
            "cu_seqlens_kv",
            || format!("{} elements, as cu_seqlens_q", cu_seqlens_q.len()),
            || cu_seqlens_kv.len().to_string(),
        )?;
        let mut sequences = Vec::with_capacity(cu_seqlens_q.len() - 1);
        for (i, (q, kv)) in cu_seqlens_q.windows(2).zip(cu_seqlens_kv.windows(2)).enumerate() {
            let query_rows = q[0] as usize..q[1] as usize;
            let kv_rows = kv[0] as usize..kv[1] as usize;
            ensure(
                query_rows.len() <= kv_rows.len(),
                "cu_seqlens_q",
                || format!("at most {} query rows in sequence {i}, its number of keys", kv_rows.len()),
                || query_rows.len().to_string(),
            )?;
            let first_position = kv_rows.len() - query_rows.len();
            sequences.push(Sequence { query_rows, kv_rows, first_position });
        }
        Ok(Self { sequences, total_q, total_kv })
    }

    /// A batch in which every sequence has as many query rows as keys (training).
    pub fn from_lengths(lengths: &[usize]) -> Result<Self> {
        let mut sums = vec![0i32];
        for length in lengths {
            let next = (sums[sums.len() - 1] as usize).saturating_add(*length);
            sums.push(i32::try_from(next).map_err(|_| Error::input("cu_seqlens_q", "a total below 2^31", next))?);
        }
        Self::from_cu_seqlens(&sums, &sums)
    }

    /// One sequence of `length` tokens.
    pub fn single(length: usize) -> Self {
        let whole = Sequence { query_rows: 0..length, kv_rows: 0..length, first_position: 0 };
        Self { sequences: vec![whole], total_q: length, total_kv: length }
    }

    /// The same batch for the rows `rows` of `query` only. Every sequence keeps its keys, and its query rows
    /// keep their positions; a sequence none of whose rows are taken has no query rows.
    pub fn slice_queries(&self, rows: Range<usize>) -> Self {
        let clip = |row: usize| row.clamp(rows.start, rows.end) - rows.start;
        let sequences = self.sequences.iter().map(|sequence| {
            let query_rows = clip(sequence.query_rows.start)..clip(sequence.query_rows.end);
            let skipped =
                (rows.start.max(sequence.query_rows.start) - sequence.query_rows.start).min(sequence.query_len());
            let first_position = sequence.first_position + skipped;
            Sequence { query_rows, kv_rows: sequence.kv_rows.clone(), first_position }
        });
        Self { sequences: sequences.collect(), total_q: rows.len(), total_kv: self.total_kv }
    }

    /// The sequences in order.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// Rows of `query`.
    pub fn total_q(&self) -> usize {
        self.total_q
    }

    /// Rows of `key` and `value`.
    pub fn total_kv(&self) -> usize {
        self.total_kv
    }

    /// Number of query rows of the longest sequence.
    pub fn max_query_len(&self) -> usize {
        self.sequences.iter().map(Sequence::query_len).max().unwrap_or(0)
    }

    /// Number of keys of the longest sequence.
    pub fn max_kv_len(&self) -> usize {
        self.sequences.iter().map(Sequence::kv_len).max().unwrap_or(0)
    }

    /// Prefix sums of the compressed keys of every sequence, `[batch + 1]`.
    pub fn compressed_offsets(&self, kernel_size: usize, kernel_stride: usize) -> Vec<usize> {
        let mut offsets = vec![0];
        let mut total = 0;
        for sequence in &self.sequences {
            total += sequence.num_compressed(kernel_size, kernel_stride);
            offsets.push(total);
        }
        offsets
    }

    /// Rows of the compressed keys and values of the whole batch.
    pub fn total_compressed(&self, kernel_size: usize, kernel_stride: usize) -> usize {
        self.sequences.iter().map(|s| s.num_compressed(kernel_size, kernel_stride)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_may_be_empty_and_shorter_in_queries() {
        let batch = Batch::from_cu_seqlens(&[0, 3, 3, 8], &[0, 10, 10, 15]).expect("valid");
        assert_eq!(batch.sequences()[0].first_position, 7);
        assert_eq!(batch.sequences()[1].query_len(), 0);
        assert_eq!(batch.sequences()[2], Sequence { query_rows: 3..8, kv_rows: 10..15, first_position: 0 });
        assert_eq!((batch.total_q(), batch.total_kv(), batch.max_kv_len()), (8, 15, 10));
        assert_eq!(batch.compressed_offsets(4, 2), [0, 4, 4, 5]);
    }

    #[test]
    fn broken_prefix_sums_are_refused_by_name() {
        let cases: [(&[i32], &[i32], &str, &str); 6] = [
            (&[], &[0], "cu_seqlens_q", "batch + 1"),
            (&[1, 2], &[0, 2], "cu_seqlens_q", "first element 0"),
            (&[0, 5, 4], &[0, 5, 6], "cu_seqlens_q", "4 after 5 at index 2"),
            (&[0, 5, 6], &[0, 5, -1], "cu_seqlens_kv", "-1 after 5"),
            (&[0, 5], &[0, 5, 6], "cu_seqlens_kv", "2 elements"),
            (&[0, 5], &[0, 4], "cu_seqlens_q", "at most 4 query rows in sequence 0"),
        ];
        for (q, kv, argument, text) in cases {
            let error = Batch::from_cu_seqlens(q, kv).expect_err(text);
            assert_eq!(error.argument(), Some(argument), "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn a_slice_of_the_queries_keeps_positions_and_keys() {
        let batch = Batch::from_cu_seqlens(&[0, 3, 3, 8], &[0, 10, 10, 15]).expect("valid");
        let slice = batch.slice_queries(2..5);
        assert_eq!((slice.total_q(), slice.total_kv()), (3, 15));
        assert_eq!(slice.sequences()[0], Sequence { query_rows: 0..1, kv_rows: 0..10, first_position: 9 });
        assert_eq!(slice.sequences()[2], Sequence { query_rows: 1..3, kv_rows: 10..15, first_position: 0 });
        let last = batch.slice_queries(5..8);
        assert_eq!(last.sequences()[0].query_len(), 0);
        assert_eq!(last.sequences()[2], Sequence { query_rows: 0..3, kv_rows: 10..15, first_position: 2 });
    }

    #[test]
    fn a_total_that_no_prefix_sum_holds_is_refused() {
        for lengths in [[1 << 30, 1 << 30], [5, usize::MAX]] {
            let error = Batch::from_lengths(&lengths).expect_err("2^31 tokens or more");
            assert_eq!(error.argument(), Some("cu_seqlens_q"), "{error}");
        }
    }

    #[test]
    fn windows_are_counted_whole() {
        let count = |len, l, s| Batch::single(len).total_compressed(l, s);
        assert_eq!([0, 31, 32, 47, 48, 64].map(|len| count(len, 32, 16)), [0, 0, 1, 1, 2, 3]);
    }
}
