//! Stage `select`, second half: the top-k blocks of every row, and how far rounding may change them.

use crate::arithmetic::{Arithmetic, Exact};
use crate::attention::{self, AttentionForward, AttentionInputs, AttentionRow, Place, places};
use crate::score;
use fsa_core::{NsaConfig, Result, SelectArgs, Tensor};

/// The blocks of a row, ascending, given the scores of its candidates `0 ..= own`: first blocks and own blocks are
/// forced, the rest are taken by descending score (as f32, which is what a score is), ties to the lower id.
pub fn top_k(scores: &[f64], config: &NsaConfig) -> Vec<usize> {
    let slots = config.topk.min(scores.len());
    let mut chosen: Vec<usize> = (0..scores.len()).filter(|block| is_forced(*block, scores.len(), config)).collect();
    let mut free: Vec<usize> = (0..scores.len()).filter(|block| !is_forced(*block, scores.len(), config)).collect();
    // A stable sort keeps the lower id first among equals. NaN compares equal to all: its rows promise nothing.
    free.sort_by(|i, j| (scores[*j] as f32).partial_cmp(&(scores[*i] as f32)).unwrap_or(std::cmp::Ordering::Equal));
    free.truncate(slots.saturating_sub(chosen.len()));
    chosen.extend(free);
    chosen.sort_unstable();
    chosen
}

/// True for the blocks that a row with `candidates` blocks always lists.
pub fn is_forced(block: usize, candidates: usize, config: &NsaConfig) -> bool {
    block < config.init_blocks || block + config.local_blocks >= candidates
}

/// The forward of `select`.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Compressed attention.
    pub attention: AttentionForward,
    /// Scores of the candidates of every row: row `r` of kv head `h` is number `h * total_q + r`.
    pub scores: Vec<Vec<f64>>,
    /// `[num_kv_heads, total_q, topk]`, row-major.
    pub topk_indices: Vec<i32>,
}

impl Selection {
    /// The ids as a tensor.
    pub fn tensor(&self, num_kv_heads: usize, total_q: usize, topk: usize) -> Result<Tensor> {
        Tensor::new("topk_indices", self.topk_indices.clone(), &[num_kv_heads, total_q, topk])
    }
}

/// Compressed attention, scores and top-k. `inputs` holds the compressed keys and values.
pub fn forward(a: &dyn Arithmetic, inputs: &AttentionInputs<'_>, config: &NsaConfig) -> Result<Selection> {
    let visible = attention::visible(&fsa_core::backend::compressed_stage(config), inputs.batch)?;
    let attention = attention::forward(a, inputs, &*visible);
    let (mut scores, mut topk_indices) = (Vec::new(), Vec::new());
    for kv_head in 0..inputs.key.shape()[1] {
        for place in places(inputs.batch, kv_head) {
            let row = score::row_scores(a, inputs, &attention, config, &place);
            let chosen = top_k(&row, config);
            let absent = std::iter::repeat_n(-1, config.topk - chosen.len());
            topk_indices.extend(chosen.iter().map(|block| *block as i32).chain(absent));
            scores.push(row);
        }
    }
    Ok(Selection { attention, scores, topk_indices })
}

/// The selection of a call, in f64.
pub fn select(args: &SelectArgs<'_>) -> Result<Selection> {
    args.config.validate()?;
    args.attention.shape(&args.stage())?;
    forward(&Exact, &AttentionInputs::new(&args.attention), args.config)
}

/// Scores of the candidates of one row and kv head, reading only what the row sees: for sampled checks.
pub fn select_row(args: &SelectArgs<'_>, row: usize, kv_head: usize) -> Result<Vec<f64>> {
    args.config.validate()?;
    let shape = args.attention.shape(&args.stage())?;
    let offsets = args.attention.batch.compressed_offsets(args.config.kernel_size, args.config.kernel_stride);
    let Some(place) = places(args.attention.batch, kv_head).find(|place| place.row == row) else {
        return Ok(Vec::new());
    };
    let (first, last) = (offsets[place.number], offsets[place.number + 1]);
    let votes = score::voters(args.config, kv_head, shape.gqa_group_size())
        .map(|head| {
            let row = attention::attention_row(&args.stage(), &args.attention, row, head)?;
            Ok(score::probabilities(&Exact, &row, first, last - first))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(score::block_scores(&Exact, &votes, args.config, place.position / args.config.block_size + 1))
}

/// Scores of a row with the largest error that f32 arithmetic can give them, in any order of any sum.
///
/// With u = 2^-24, D = head_dim, n visible keys and `X = |scale| * |q| * max |k|` (an upper bound of every logit and
/// of the sum of the magnitudes of its terms, by Cauchy-Schwarz):
///
/// - a logit errs by at most (D + 6) u X: D products and sums, the scale, a change of base and its undoing;
/// - `lse` errs by as much, plus n u for the sum, 8 u for exponential and logarithm, and its own rounding
///   u (X + ln n);
/// - the difference is rounded once more, u (2 X + ln n), and its exponential errs by 8 u;
///
/// so a probability errs by the factor exp(u ((2 D + 15) X + n + 2 ln n + 16)), and a sum of N of them by N u more.
/// Besides, a probability below the least normal f32 may be flushed to 0.
#[derive(Debug, Clone)]
pub struct BoundedScores {
    /// In f64.
    pub scores: Vec<f64>,
    /// Largest error of each.
    pub errors: Vec<f64>,
    /// Scores that are 0 in f32 however they are computed.
    zero: Vec<bool>,
}

/// A score below this is 0 in f32 even if it is divided by the softmax denominator last (2^-149 is 1.4e-45).
const SURELY_ZERO: f64 = 1e-60;

impl BoundedScores {
    /// Bounds the scores of the candidates of a row.
    pub fn new(inputs: &AttentionInputs<'_>, selection: &Selection, config: &NsaConfig, place: &Place<'_>) -> Self {
        let total_q = inputs.query.shape()[0];
        let group = inputs.gqa_group_size();
        let scores = selection.scores[place.kv_head * total_q + place.row].clone();
        let rows = score::voters(config, place.kv_head, group).map(|head| {
            let row: &AttentionRow = &selection.attention.rows[head * total_q + place.row];
            exponent_error(inputs, row, &[place.row, head], place.kv_head)
        });
        let exponent = rows.fold(0.0, f64::max);
        let terms = (group * (config.block_size * config.kernel_size / config.kernel_stride.pow(2))) as f64;
        let relative = (exponent + F32_UNIT * terms).exp_m1();
        let flushed = terms * f64::from(f32::MIN_POSITIVE);
        let errors = scores.iter().map(|score| score * relative + flushed).collect();
        let zero = scores.iter().map(|score| score * (1.0 + relative) < SURELY_ZERO).collect();
        Self { scores, errors, zero }
    }

    /// True if `i` precedes `j` whatever the rounding.
    pub fn precedes(&self, i: usize, j: usize) -> bool {
        if self.zero[i] && self.zero[j] {
            return i < j;
        }
        self.scores[i] - self.errors[i] > self.scores[j] + self.errors[j]
    }

    /// For every candidate: listed whatever the rounding, not listed whatever the rounding, or `None`.
    pub fn verdicts(&self, config: &NsaConfig) -> Vec<Option<bool>> {
        let candidates = self.scores.len();
        let forced = |block: usize| is_forced(block, candidates, config);
        let free: Vec<usize> = (0..candidates).filter(|block| !forced(*block)).collect();
        let slots = config.topk.min(candidates) - (candidates - free.len());
        let verdict = |j: usize| {
            let others = || free.iter().copied().filter(move |i| *i != j);
            if forced(j) || others().filter(|i| !self.precedes(j, *i)).count() < slots {
                Some(true)
            } else if others().filter(|i| self.precedes(*i, j)).count() >= slots {
                Some(false)
            } else {
                None
            }
        };
        if self.scores.iter().any(|score| score.is_nan()) {
            return (0..candidates).map(|block| forced(block).then_some(true)).collect();
        }
        (0..candidates).map(verdict).collect()
    }
}

const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;

fn exponent_error(inputs: &AttentionInputs<'_>, row: &AttentionRow, query: &[usize], kv_head: usize) -> f64 {
    let norm = |vector: &[f64]| vector.iter().map(|v| v * v).sum::<f64>().sqrt();
    let longest = row.keys.iter().map(|key| norm(inputs.key.row(&[*key, kv_head]))).fold(0.0, f64::max);
    let x = inputs.scale.abs() * norm(inputs.query.row(query)) * longest;
    let (dim, n) = (inputs.query.shape()[2] as f64, row.keys.len().max(1) as f64);
    F32_UNIT * ((2.0 * dim + 15.0) * x + n + 2.0 * n.ln() + 16.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(topk: usize, init_blocks: usize, local_blocks: usize) -> NsaConfig {
        NsaConfig { topk, init_blocks, local_blocks, ..NsaConfig::default() }
    }

    #[test]
    fn forced_blocks_come_first_and_ties_go_to_the_lower_id() {
        let scores = [0.0, 5.0, 1.0, 3.0, 3.0, 3.0, 0.5, 0.1];
        assert_eq!(top_k(&scores, &config(3, 1, 2)), [0, 6, 7]);
        assert_eq!(top_k(&scores, &config(4, 1, 2)), [0, 1, 6, 7]);
        assert_eq!(top_k(&scores, &config(6, 1, 2)), [0, 1, 3, 4, 6, 7]);
        assert_eq!(top_k(&scores, &config(3, 0, 0)), [1, 3, 4]);
        assert_eq!(top_k(&scores, &config(16, 1, 2)), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(top_k(&[0.0; 5], &config(2, 0, 0)), [0, 1]);
        assert_eq!(top_k(&[0.0; 5], &config(4, 1, 2)), [0, 1, 3, 4]);
        assert_eq!(top_k(&[7.0], &config(3, 1, 2)), [0]);
        assert_eq!(top_k(&[7.0, 1.0], &config(4, 2, 2)), [0, 1]);
    }

    #[test]
    fn scores_are_compared_as_f32() {
        // 1 and 1 + 2^-30 are one f32: the lower id wins though its f64 is smaller.
        let scores = [1.0, 1.0 + 2.0f64.powi(-30), 0.0];
        assert_eq!(top_k(&scores, &config(1, 0, 0)), [0]);
    }

    #[test]
    fn verdicts_leave_open_only_what_rounding_may_decide() {
        let bounded = |scores: &[f64], error: f64| BoundedScores {
            scores: scores.to_vec(),
            errors: vec![error; scores.len()],
            zero: scores.iter().map(|score| *score < SURELY_ZERO).collect(),
        };
        let (yes, no) = (Some(true), Some(false));
        let open = bounded(&[3.0, 2.0, 1.9, 1.0, 0.0, 0.0], 0.1).verdicts(&config(2, 0, 0));
        assert_eq!(open, [yes, None, None, no, no, no]);
        let ties = bounded(&[3.0, 0.0, 1e-70, 0.0], 0.1).verdicts(&config(2, 0, 0));
        assert_eq!(ties, [yes, yes, no, no]);
        let forced = bounded(&[0.0, 1.0, 1.0, 0.0], 0.1).verdicts(&config(3, 1, 1));
        assert_eq!(forced, [yes, None, None, yes]);
    }
}
