//! Cases from a stage, a seed and a number.
//!
//! Every field deals its values from a deck that is shuffled anew when it is used up: after as many cases as a
//! field has values, all have occurred, whatever the seed, and the fields of different decks meet in any combination.

use crate::case::{Case, CompressionKind, Hostile, Pass, RopeKind, ViewLayout};
use crate::random::Random;
use fsa_core::config::BLOCK_SIZES;
use fsa_core::ops::GateLayout;
use fsa_core::{DType, NsaConfig, ScoreHeads, Stage};

/// Query heads per kv head.
pub const GROUP_SIZES: [usize; 8] = [1, 2, 3, 4, 5, 7, 8, 16];

/// Multiplications of a forward in f64 that a case may cost: a few milliseconds.
const BUDGET: usize = 2_000_000;

/// Query heads of a case.
const MAX_HEADS: usize = 16;

const SMALL_DIMS: [usize; 8] = [64, 8, 16, 128, 32, 64, 24, 40];

/// Window sizes and strides of the compression; all strides divide all block sizes.
const KERNELS: [(usize, usize); 8] = [(32, 16), (16, 8), (16, 16), (32, 8), (8, 4), (64, 16), (4, 2), (32, 16)];

const WINDOWS: [usize; 10] = [0, 1, 15, 16, 17, 31, 32, 64, 100, 512];

struct Dealer {
    words: [u64; 3],
    number: usize,
    field: u64,
}

impl Dealer {
    /// The next field's value.
    fn pick<T: Copy>(&mut self, deck: &[T]) -> T {
        self.field += 1;
        let (epoch, place) = (self.number / deck.len(), self.number % deck.len());
        let mut order: Vec<usize> = (0..deck.len()).collect();
        let [seed, stage, pass] = self.words;
        Random::new(&[seed, stage, pass, self.field, epoch as u64]).shuffle(&mut order);
        deck[order[place]]
    }

    /// Half of the cases from the usual dimensions, half from all multiples of 8 up to 256.
    fn dim(&mut self) -> usize {
        let all: Vec<usize> = (1..=32).map(|k| 8 * k).collect();
        let number = self.number;
        self.number /= 2;
        let dims = (self.pick(&SMALL_DIMS), self.pick(&all));
        self.number = number;
        if number.is_multiple_of(2) { dims.0 } else { dims.1 }
    }
}

/// Case `number` of a stage, pass and dtype. The three dtypes get the same cases.
pub fn generate(stage: Stage, pass: Pass, dtype: DType, seed: u64, number: usize) -> Case {
    let words = [seed, stage as u64, pass as u64];
    let mut dealer = Dealer { words, number, field: 0 };
    let mut case = Case::new(stage, pass, dtype);
    case.seed = Random::new(&[seed, stage as u64, pass as u64, number as u64]).next_u64() % 1_000_000;
    let group = dealer.pick(&GROUP_SIZES);
    case.num_kv_heads = dealer.pick(&[1, 2, 3]).min(MAX_HEADS / group).max(1);
    case.num_q_heads = group * case.num_kv_heads;
    case.head_dim = dealer.dim();
    let other = dealer.dim();
    case.value_dim = if dealer.pick(&[true, false]) { case.head_dim } else { other };
    case.layout = dealer.pick(&[
        ViewLayout::Contiguous,
        ViewLayout::Contiguous,
        ViewLayout::Padded,
        ViewLayout::HeadMajor,
        ViewLayout::Interleaved,
    ]);
    case.hostile = dealer.pick(hostile_kinds(stage, pass));
    set_parameters(&mut case, &mut dealer);
    set_lengths(&mut case, &mut dealer);
    fit(&mut case);
    case
}

fn hostile_kinds(stage: Stage, pass: Pass) -> &'static [Hostile] {
    use Hostile::{
        AbsurdIndices, AllChoose, FarPositions, Huge, LogitOffset, LogitOffsetNegative, NanFuture, NanUnseen,
        NobodyChooses, None, Peaked, SignedGates, Tiny,
    };
    match (stage, pass) {
        (Stage::Selected, _) => &[
            None,
            None,
            AbsurdIndices,
            AbsurdIndices,
            AllChoose,
            NobodyChooses,
            NanUnseen,
            NanFuture,
            LogitOffset,
            LogitOffsetNegative,
            Huge,
            Tiny,
            Peaked,
        ],
        (Stage::Select, _) => {
            &[None, None, None, Peaked, Peaked, NanUnseen, NanFuture, LogitOffset, LogitOffsetNegative, Huge, Tiny]
        }
        (Stage::Compress, _) => &[None, None, NanUnseen, NanFuture, Huge, Tiny],
        (Stage::Rope, _) => &[None, None, FarPositions, Huge, Tiny],
        (Stage::Combine, _) => &[None, Huge, SignedGates, Tiny],
        // The gradient of a weight sums over all keys: NaN in one of them is NaN in the weight by definition.
        (Stage::Nsa, Pass::Backward) => &[None, None, None, LogitOffset, Huge, SignedGates, Tiny, Peaked],
        (Stage::Nsa, Pass::Forward) => {
            &[None, None, NanUnseen, NanFuture, LogitOffset, Huge, SignedGates, Tiny, Peaked]
        }
        _ => &[None, None, NanUnseen, NanFuture, LogitOffset, LogitOffsetNegative, Huge, Tiny, Peaked],
    }
}

fn set_parameters(case: &mut Case, dealer: &mut Dealer) {
    let stage = case.stage;
    let (kernel_size, kernel_stride) = dealer.pick(&KERNELS);
    let block_size = dealer.pick(&BLOCK_SIZES);
    let (topk, init_blocks, local_blocks) =
        dealer.pick(&[(16, 1, 2), (4, 1, 2), (3, 1, 2), (1, 0, 1), (2, 0, 0), (8, 2, 1), (4, 0, 1), (5, 3, 2)]);
    let score_heads = dealer.pick(&[ScoreHeads::GroupSum, ScoreHeads::GroupSum, ScoreHeads::FirstHead]);
    let window_size = dealer.pick(&WINDOWS);
    let (kinds, ropes) = (CompressionKind::ALL, RopeKind::ALL);
    let (keys, values, rope) = (dealer.pick(kinds), dealer.pick(kinds), dealer.pick(ropes));
    let gates = dealer.pick(&[GateLayout::PerRow, GateLayout::PerHead]);
    let scale = dealer.pick(&[None, None, None, None, Some(0.25), Some(1.0), Some(-0.125)]);
    let grad_lse = dealer.pick(&[false, true]);
    let plain = NsaConfig::default();
    let windows = matches!(stage, Stage::Compress | Stage::Compressed | Stage::Select | Stage::Nsa);
    let blocks = matches!(stage, Stage::Select | Stage::Selected | Stage::Nsa);
    let lists = matches!(stage, Stage::Select | Stage::Nsa);
    case.config = NsaConfig {
        kernel_size: if windows { kernel_size } else { plain.kernel_size },
        kernel_stride: if windows { kernel_stride } else { plain.kernel_stride },
        block_size: if blocks { block_size } else { plain.block_size },
        topk: if blocks { topk } else { plain.topk },
        init_blocks: if lists { init_blocks } else { plain.init_blocks },
        local_blocks: if lists { local_blocks } else { plain.local_blocks },
        score_heads: if lists { score_heads } else { plain.score_heads },
        window_size: if matches!(stage, Stage::Window | Stage::Nsa) { window_size } else { plain.window_size },
    };
    if matches!(stage, Stage::Compress | Stage::Nsa) {
        case.key_compression = keys;
    }
    if stage == Stage::Nsa {
        case.value_compression = values;
    }
    if matches!(stage, Stage::Rope | Stage::Nsa) {
        case.rope = if stage == Stage::Rope && rope == RopeKind::None { RopeKind::Llama3 } else { rope };
    }
    if matches!(stage, Stage::Combine | Stage::Nsa) {
        case.gates = gates;
    }
    let attends = !matches!(stage, Stage::Compress | Stage::Rope | Stage::Combine);
    case.softmax_scale = scale.filter(|_| attends);
    case.grad_lse = grad_lse && case.pass == Pass::Backward && attends && !matches!(stage, Stage::Nsa | Stage::Select);
}

/// Lengths around the edges that the stage has.
fn edges(case: &Case) -> Vec<usize> {
    let NsaConfig { kernel_size: l, kernel_stride: s, block_size: b, window_size: w, .. } = case.config;
    let around_blocks = [b - 1, b, b + 1, 2 * b - 1, 2 * b, 2 * b + 1, 3 * b + 7];
    let around_windows = [l - 1, l, l + 1, l + s - 1, l + s, l + s + 1, l + 4 * s, l + 9 * s + 3];
    // More compressed keys than a backend is likely to take at once: what it carries from one tile of 64 or 128
    // to the next shows only here. `fit` then leaves few query rows.
    let beyond_tiles = [65 * s + l, 131 * s + l + 3];
    let mut edges = vec![1, 2];
    match case.stage {
        Stage::Selected => edges.extend(around_blocks),
        Stage::Window if w < 256 => edges.extend([w.max(1), w + 1, w + 2, 2 * w + 3, 65, 130]),
        Stage::Compress => edges.extend(around_windows),
        Stage::Compressed => edges.extend(around_windows.into_iter().chain(beyond_tiles)),
        Stage::Select | Stage::Nsa => {
            edges.extend(around_windows.into_iter().chain(around_blocks).chain(beyond_tiles));
            // More candidates than slots: otherwise scores decide nothing.
            if b <= 64 {
                edges.extend([8 * b, 9 * b - 1, 12 * b + 5]);
            }
        }
        _ => edges.extend([15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 257]),
    }
    edges
}

fn set_lengths(case: &mut Case, dealer: &mut Dealer) {
    let edges = edges(case);
    let (n, m) = (dealer.pick(&edges), dealer.pick(&edges));
    let mut pattern = dealer.pick(&[0, 0, 1, 2, 3, 4, 5, 6, 7]);
    if case.hostile == Hostile::NanUnseen {
        // Keys that nobody sees: of a sequence without queries, or before the first query's window.
        pattern = match case.stage {
            Stage::Selected => pattern,
            Stage::Window => 1,
            _ => 5,
        };
    }
    let lengths: Vec<(usize, usize)> = match pattern {
        0 => vec![(n, n)],
        1 => vec![(1, n)],
        2 => vec![(n.div_ceil(2), n)],
        3 => vec![(n.saturating_sub(1), n)],
        4 => vec![(n, n), (0, 0), (m.div_ceil(2), m)],
        5 => vec![(n.min(9), n), (0, m)],
        6 => vec![(1, 1), (n, n), (1, m)],
        _ => vec![(0, 0), (3, 3), (1, 2), (0, 1), (n, n)],
    };
    (case.query_lens, case.kv_lens) = lengths.into_iter().unzip();
    let config = &mut case.config;
    let longest = case.kv_lens.iter().copied().max().unwrap_or(0);
    if matches!(case.stage, Stage::Select | Stage::Nsa) && longest > 64 * config.kernel_stride {
        // Many more candidates than slots, so that a wrong score changes the list.
        config.block_size = config.block_size.min(64);
        config.topk = config.topk.min(config.init_blocks + config.local_blocks + 3).max(1);
    }
    if case.stage == Stage::Select && case.hostile == Hostile::Peaked {
        // All scores but those around the peak are 0, and far more blocks than slots: ties decide.
        config.block_size = config.block_size.min(32);
        config.topk = config.topk.min(config.init_blocks + config.local_blocks + 2).max(1);
        case.kv_lens = vec![12 * config.block_size + 5];
        case.query_lens = case.kv_lens.clone();
    }
}

/// Takes query rows from the longest sequence, then dimensions, until the case is cheap.
fn fit(case: &mut Case) {
    let longest = |case: &Case| case.query_lens.iter().copied().max().unwrap_or(0);
    while case.cost() > BUDGET && longest(case) > 4 && case.stage != Stage::Compress {
        let most = longest(case);
        case.query_lens.iter_mut().filter(|len| **len == most).for_each(|len| *len = len.div_ceil(2));
    }
    while case.cost() > BUDGET && case.head_dim.max(case.value_dim) > 8 {
        for dim in [&mut case.head_dim, &mut case.value_dim] {
            *dim = (*dim / 16 * 8).max(8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::STAGES;
    use std::collections::BTreeSet;

    fn cases(stage: Stage, pass: Pass, count: usize) -> Vec<Case> {
        (0..count).map(|number| generate(stage, pass, DType::Bf16, 11, number)).collect()
    }

    #[test]
    fn every_case_is_valid_small_and_survives_its_line() {
        for stage in STAGES {
            for pass in Pass::ALL {
                for case in cases(stage, *pass, 300) {
                    if stage != Stage::Select || *pass == Pass::Forward {
                        case.validate().unwrap_or_else(|error| panic!("{case}: {error}"));
                        assert_eq!(case.to_string().parse::<Case>().expect("parses"), case);
                    }
                    assert!(case.cost() <= 2 * BUDGET, "{case} costs {}", case.cost());
                }
            }
        }
    }

    #[test]
    fn a_hundred_cases_cover_what_must_be_covered() {
        let cases = cases(Stage::Selected, Pass::Backward, 100);
        let set = |f: &dyn Fn(&Case) -> usize| cases.iter().map(f).collect::<BTreeSet<_>>();
        assert_eq!(set(&Case::gqa_group_size), BTreeSet::from(GROUP_SIZES));
        assert_eq!(set(&|case| case.config.block_size), BTreeSet::from(BLOCK_SIZES));
        let dims = set(&|case| case.head_dim);
        assert!(dims.contains(&8) && dims.contains(&256) && dims.len() >= 28, "{dims:?}");
        assert!(cases.iter().any(|case| case.value_dim != case.head_dim));
        let hostile: BTreeSet<_> = cases.iter().map(|case| case.hostile).collect();
        assert_eq!(hostile, hostile_kinds(Stage::Selected, Pass::Backward).iter().copied().collect());
        let layouts: BTreeSet<_> = cases.iter().map(|case| case.layout).collect();
        assert_eq!(layouts.len(), ViewLayout::ALL.len());
        for block in BLOCK_SIZES {
            let lengths: BTreeSet<_> = cases
                .iter()
                .filter(|case| case.config.block_size == block)
                .flat_map(|case| case.kv_lens.iter().copied())
                .collect();
            let edges = [block - 1, block, block + 1].iter().filter(|edge| lengths.contains(edge)).count();
            assert!(edges >= 1, "block {block}: {lengths:?}");
        }
        let pairs = || cases.iter().flat_map(|case| case.query_lens.iter().zip(&case.kv_lens));
        assert!(pairs().any(|(q, kv)| *q == 0 && *kv == 0), "an empty sequence");
        assert!(pairs().any(|(q, kv)| *q == 0 && *kv > 0), "keys without queries");
        assert!(pairs().any(|(q, kv)| *q > 0 && q < kv), "fewer queries than keys");
        assert!(cases.iter().any(|case| case.query_lens.iter().sum::<usize>() == 1), "one row");
        assert!(cases.iter().any(|case| case.grad_lse) && cases.iter().any(|case| case.softmax_scale.is_some()));
    }
}
