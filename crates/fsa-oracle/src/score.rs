//! Stage `select`, first half: block scores from the probabilities of the compressed keys.

use crate::arithmetic::Arithmetic;
use crate::attention::{AttentionForward, AttentionInputs, AttentionRow, Place};
use fsa_core::{NsaConfig, ScoreHeads};

/// Scores of blocks `0 .. num_blocks`. `probabilities` holds one vector for every head that votes: the probability of
/// every compressed key of the sequence, 0 for those that the row does not see.
pub fn block_scores(a: &dyn Arithmetic, probabilities: &[Vec<f64>], config: &NsaConfig, num_blocks: usize) -> Vec<f64> {
    let steps = (config.block_size / config.kernel_stride) as isize;
    let reach = (config.kernel_size / config.kernel_stride) as isize;
    let mut scores = vec![0.0; num_blocks];
    for (j, score) in scores.iter_mut().enumerate() {
        for head in probabilities {
            for m in 0..steps {
                for n in 0..reach {
                    let i = j as isize * steps + m - n;
                    if let Some(p) = usize::try_from(i).ok().and_then(|i| head.get(i)) {
                        *score = a.op(*score + p);
                    }
                }
            }
        }
    }
    scores
}

/// Probabilities of the compressed keys of a sequence whose first one is `first`.
pub fn probabilities(a: &dyn Arithmetic, row: &AttentionRow, first: usize, count: usize) -> Vec<f64> {
    let mut probabilities = vec![0.0; count];
    for (key, logit) in row.keys.iter().zip(&row.logits) {
        probabilities[key - first] = a.op(a.op(logit - row.lse).exp());
    }
    probabilities
}

/// Query heads whose probabilities count for a kv head.
pub fn voters(config: &NsaConfig, kv_head: usize, gqa_group_size: usize) -> std::ops::Range<usize> {
    let first = kv_head * gqa_group_size;
    match config.score_heads {
        ScoreHeads::GroupSum => first..first + gqa_group_size,
        ScoreHeads::FirstHead => first..first + 1,
    }
}

/// Scores of the candidates of a row, the blocks `0 ..= floor(position / block_size)`.
pub fn row_scores(
    a: &dyn Arithmetic,
    inputs: &AttentionInputs<'_>,
    forward: &AttentionForward,
    config: &NsaConfig,
    place: &Place<'_>,
) -> Vec<f64> {
    let offsets = inputs.batch.compressed_offsets(config.kernel_size, config.kernel_stride);
    let (first, last) = (offsets[place.number], offsets[place.number + 1]);
    let total_q = inputs.query.shape()[0];
    let votes: Vec<Vec<f64>> = voters(config, place.kv_head, inputs.gqa_group_size())
        .map(|head| probabilities(a, &forward.rows[head * total_q + place.row], first, last - first))
        .collect();
    block_scores(a, &votes, config, place.position / config.block_size + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arithmetic::Exact;

    /// For l = 32, s = 16, B = 64 the compressed keys `4j - 1 .. 4j + 3` count 1, 2, 2, 2, 1.
    #[test]
    fn default_weights_are_1_2_2_2_1() {
        let config = NsaConfig::default();
        for i in 0..12usize {
            let mut one = vec![0.0; 12];
            one[i] = 1.0;
            let scores = block_scores(&Exact, &[one], &config, 3);
            let expected: Vec<f64> = (0..3)
                .map(|j: isize| match i as isize - (4 * j - 1) {
                    0 | 4 => 1.0,
                    1..=3 => 2.0,
                    _ => 0.0,
                })
                .collect();
            assert_eq!(scores, expected, "compressed key {i}");
        }
        // By hand: P = 0.1, 0.2, 0.3, 0.4 gives block 0: 2 * 0.1 + 2 * 0.2 + 2 * 0.3 + 0.4, block 1: 0.4.
        let scores = block_scores(&Exact, &[vec![0.1, 0.2, 0.3, 0.4]], &config, 2);
        assert!((scores[0] - 1.6).abs() < 1e-15 && (scores[1] - 0.4).abs() < 1e-15, "{scores:?}");
    }

    #[test]
    fn weights_of_the_vocabulary_are_the_same_sum() {
        for (kernel_size, kernel_stride, block_size) in
            [(32, 16, 64), (16, 16, 64), (64, 16, 16), (32, 8, 16), (4, 2, 16)]
        {
            let config = NsaConfig { kernel_size, kernel_stride, block_size, ..NsaConfig::default() };
            let (steps, reach) = (block_size / kernel_stride, kernel_size / kernel_stride - 1);
            let values: Vec<f64> = (0..4 * steps).map(|i| (i * i % 17) as f64).collect();
            for (j, score) in block_scores(&Exact, std::slice::from_ref(&values), &config, 4).into_iter().enumerate() {
                let weighted = config.score_weights().into_iter().enumerate().map(|(k, weight)| {
                    let i = (j * steps + k).checked_sub(reach);
                    f64::from(weight) * i.and_then(|i| values.get(i)).copied().unwrap_or(0.0)
                });
                assert_eq!(score, weighted.sum::<f64>(), "block {j} of {config:?}");
            }
        }
    }
}
