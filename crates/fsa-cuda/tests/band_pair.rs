//! The selected blocks, with a mask, and the window in one walk, on a GPU: forwards of the whole by the dense route.

use fsa_core::{DType, NsaConfig, Stage};
use fsa_cuda::plan::{Route, Routing};
use fsa_cuda::{CudaBackend, Environment};
use fsa_oracle::case::CompressionKind;
use fsa_oracle::generate::generate;
use fsa_oracle::suite::Trial;
use fsa_oracle::{Case, Hostile, Pass};

/// Every call twice, with equal bits.
fn check(cases: impl IntoIterator<Item = Case>) {
    let routing = Routing::Always(Route::DenseMasked);
    let environment = Environment { routing, ..Environment::read().expect("valid") };
    let backend = CudaBackend::with(&environment).expect("a device");
    let trial = Trial::new(&backend);
    for case in cases {
        let outcome = trial.run_case(&case);
        assert!(outcome.passed(), "{case}: {outcome:#?}");
    }
}

/// Rows that see more blocks than they list, so that there is a mask.
fn case(dtype: DType, config: NsaConfig) -> Case {
    Case {
        query_lens: vec![150, 0, 33, 210],
        kv_lens: vec![150, 40, 161, 460],
        num_q_heads: 6,
        num_kv_heads: 2,
        head_dim: 128,
        value_dim: 128,
        config,
        ..Case::new(Stage::Nsa, Pass::Forward, dtype)
    }
}

fn usual() -> NsaConfig {
    NsaConfig { block_size: 32, topk: 4, window_size: 130, ..NsaConfig::default() }
}

#[test]
#[ignore = "needs a CUDA device"]
fn generated_cases_conform() {
    for dtype in [DType::Bf16, DType::F16] {
        check((0..16).map(|number| generate(Stage::Nsa, Pass::Forward, dtype, 3, number)));
    }
}

/// Blocks of every size, windows of nothing but the row itself and longer than the sequence, groups that fill tiles well and badly.
#[test]
#[ignore = "needs a CUDA device"]
fn blocks_windows_and_groups_of_any_size_conform() {
    let of_blocks = [(16, 10, 77), (32, 6, 0), (64, 3, 64), (128, 2, 300), (256, 1, usize::MAX >> 1)];
    check(of_blocks.map(|(block_size, topk, window_size)| {
        let (local_blocks, init_blocks) = (1, 0);
        case(DType::Bf16, NsaConfig { block_size, topk, window_size, init_blocks, local_blocks, ..usual() })
    }));
    check([(1, 1), (4, 4), (16, 1), (32, 2), (5, 1)].map(|(num_q_heads, num_kv_heads)| Case {
        num_q_heads,
        num_kv_heads,
        ..case(DType::F16, usual())
    }));
    check([64, 80, 96].map(|dim| Case { head_dim: dim, value_dim: dim, ..case(DType::Bf16, usual()) }));
}

/// Keys and values that rows do not see, of which some reach one branch and not the other; logits so far apart that the branches have
/// no reference in common.
#[test]
#[ignore = "needs a CUDA device"]
fn hostile_cases_conform() {
    for dtype in [DType::Bf16, DType::F16] {
        let kinds = [Hostile::NanFuture, Hostile::NanUnseen, Hostile::LogitOffset, Hostile::Huge, Hostile::Peaked];
        check(kinds.map(|hostile| Case {
            hostile,
            key_compression: CompressionKind::Mean,
            value_compression: CompressionKind::Mean,
            ..case(dtype, usual())
        }));
        check([0.001, 3.0, 20.0].map(|scale| Case { softmax_scale: Some(scale), ..case(dtype, usual()) }));
    }
}
