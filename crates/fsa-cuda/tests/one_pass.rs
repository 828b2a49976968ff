//! Compressed attention and the lists of blocks in one pass and in two, on a GPU: windows and heads that one kernel takes, of which the
//! cases of the conformance suite have few.

use fsa_core::{DType, NsaConfig, ScoreHeads, Stage};
use fsa_cuda::{CudaBackend, Environment};
use fsa_oracle::generate::generate;
use fsa_oracle::suite::run_case;
use fsa_oracle::{Case, Hostile, Pass};

/// Heads of a group.
const GROUPS: [usize; 5] = [4, 1, 16, 2, 8];

/// The backend that makes the lists in one pass where it can, or never; or as it likes.
fn backend(one_pass: Option<bool>) -> CudaBackend {
    let environment = Environment { one_pass, ..Environment::read().expect("valid") };
    CudaBackend::with(&environment).expect("a device")
}

fn conforms(one_pass: Option<bool>, cases: &[Case]) {
    let backend = backend(one_pass);
    for case in cases {
        let outcome = run_case(&backend, case);
        assert!(outcome.passed(), "in one pass: {one_pass:?}: {outcome:#?}");
    }
}

fn both_ways(cases: &[Case]) {
    for one_pass in [true, false] {
        conforms(Some(one_pass), cases);
    }
}

/// A generated case with windows and heads that one kernel takes.
fn case(stage: Stage, pass: Pass, number: usize) -> Case {
    let dtype = [DType::Bf16, DType::F16][number % 2];
    let mut case = generate(stage, pass, dtype, 1, number);
    let kernel_stride = case.config.kernel_stride.max(4);
    case.config = NsaConfig {
        kernel_size: kernel_stride * [2, 1, 2][number % 3],
        kernel_stride,
        block_size: 4 * kernel_stride,
        score_heads: ScoreHeads::GroupSum,
        ..case.config
    };
    let group = GROUPS[number % GROUPS.len()];
    case.num_kv_heads = case.num_kv_heads.min(16 / group);
    case.num_q_heads = group * case.num_kv_heads;
    (case.head_dim, case.value_dim) = (case.head_dim.min(128), case.value_dim.min(128));
    case
}

#[test]
#[ignore = "needs a CUDA device"]
fn lists_of_generated_cases_conform() {
    both_ways(&(0..60).map(|number| case(Stage::Select, Pass::Forward, number)).collect::<Vec<_>>());
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_whole_conforms() {
    let of = |pass| move |number| case(Stage::Nsa, pass, number);
    both_ways(&(0..30).map(of(Pass::Forward)).chain((0..15).map(of(Pass::Backward))).collect::<Vec<_>>());
}

/// Lists with room for all blocks, which are made without scores.
#[test]
#[ignore = "needs a CUDA device"]
fn the_whole_conforms_where_there_is_nothing_to_choose() {
    let of = |number, pass, lens: &[[usize; 2]]| {
        let mut case = case(Stage::Nsa, pass, number);
        (case.query_lens, case.kv_lens) = lens.iter().map(|[query, kv]| (*query, *kv)).unzip();
        let blocks = case.kv_lens.iter().sum::<usize>().div_ceil(case.config.block_size);
        case.config.topk = blocks.max(case.config.init_blocks + case.config.local_blocks);
        case.hostile = Hostile::None;
        case
    };
    let packed: &[&[[usize; 2]]] = &[&[[70, 100], [0, 9], [0, 0], [1, 1], [33, 33]], &[[128, 128]], &[[0, 40], [0, 0]]];
    let cases = |pass| (0..18).map(move |number| of(number, pass, packed[number / 2 % packed.len()]));
    conforms(None, &cases(Pass::Forward).chain(cases(Pass::Backward)).collect::<Vec<_>>());
}

/// More tiles than multiprocessors: scores of the next tile come while blocks of this one are chosen.
#[test]
#[ignore = "needs a CUDA device"]
fn many_tiles_conform() {
    let config = NsaConfig { kernel_size: 8, kernel_stride: 4, block_size: 16, ..NsaConfig::default() };
    let of = |num_kv_heads: usize, group: usize, lens: &[usize]| Case {
        query_lens: lens.to_vec(),
        kv_lens: lens.iter().map(|len| len + len / 3).collect(),
        num_q_heads: num_kv_heads * group,
        num_kv_heads,
        config: config.clone(),
        ..Case::new(Stage::Select, Pass::Forward, DType::Bf16)
    };
    both_ways(&[
        of(2, 16, &[900, 0, 7, 1100]),
        of(12, 8, &[500, 30]),
        of(40, 4, &[400, 1, 60]),
        of(24, 1, &[900, 5, 300]),
    ]);
}

/// The same in the whole, whose compressed rows leave through the place of keys; and more tiles than multiprocessors whose rows see no compressed key.
#[test]
#[ignore = "needs a CUDA device"]
fn many_tiles_of_the_whole_conform() {
    let config = NsaConfig { kernel_size: 8, kernel_stride: 4, block_size: 16, topk: 6, ..NsaConfig::default() };
    let of = |group: usize, lens: &[usize]| Case {
        query_lens: lens.to_vec(),
        kv_lens: lens.to_vec(),
        num_q_heads: 2 * group,
        num_kv_heads: 2,
        config: config.clone(),
        ..Case::new(Stage::Nsa, Pass::Forward, DType::Bf16)
    };
    let short: Vec<usize> = (0..300).map(|number| 1 + number % 7).collect();
    let mixed: Vec<usize> = (0..100).map(|number| [3, 50, 7, 130][number % 4]).collect();
    both_ways(&[of(4, &short), of(4, &mixed), of(2, &mixed), of(16, &[300, 0, 7, 400])]);
}

/// Rows of one head whose blocks are chosen from registers by two lanes, by eight, and those with more than fit: they are read twice. Of equal
/// scores the first ones win.
#[test]
#[ignore = "needs a CUDA device"]
fn rows_of_one_head_conform() {
    let of = |kv_lens: &[usize], softmax_scale| Case {
        query_lens: kv_lens.iter().map(|&len| len.min(73)).collect(),
        kv_lens: kv_lens.to_vec(),
        num_q_heads: 2,
        num_kv_heads: 2,
        config: NsaConfig { kernel_size: 8, kernel_stride: 4, block_size: 16, ..NsaConfig::default() },
        softmax_scale,
        ..Case::new(Stage::Select, Pass::Forward, DType::Bf16)
    };
    both_ways(&[
        of(&[40, 700, 3100], None),
        of(&[3100, 700], Some(0.0)),
        of(&[4100, 18_500, 33_000], None),
        of(&[5100], Some(0.0)),
    ]);
}
