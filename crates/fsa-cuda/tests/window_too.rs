//! The gradients of selected blocks and window in one pass, on a GPU: they need vectors of 128, which few cases of the conformance
//! suite have.

use fsa_core::{DType, NsaConfig, Stage};
use fsa_cuda::plan::{Route, Routing};
use fsa_cuda::{CudaBackend, Environment};
use fsa_oracle::case::CompressionKind;
use fsa_oracle::generate::generate;
use fsa_oracle::suite::Trial;
use fsa_oracle::{Case, Hostile, Pass};

fn check(cases: impl IntoIterator<Item = Case>) {
    let routing = Routing::Always(Route::DenseMasked);
    let environment = Environment { routing, ..Environment::read().expect("valid") };
    let backend = CudaBackend::with(&environment).and_then(|backend| backend.unordered()).expect("a device");
    // Once: sums in any order promise no bits.
    let trial = Trial::new(&*backend).calls(1);
    for case in cases {
        let outcome = trial.run_case(&case);
        assert!(outcome.passed(), "{case}: {outcome:#?}");
    }
}

/// A generated backward of the whole with vectors of 128.
fn case(number: usize) -> Case {
    let case = generate(Stage::Nsa, Pass::Backward, DType::Bf16, 2, number);
    Case { head_dim: 128, value_dim: 128, ..case }
}

#[test]
#[ignore = "needs a CUDA device"]
fn generated_cases_conform() {
    check((0..40).map(case));
}

/// Without weights, whose gradients are sums over all keys.
#[test]
#[ignore = "needs a CUDA device"]
fn what_a_row_does_not_see_does_not_reach_it() {
    let hostile = |number: usize| Case {
        hostile: [Hostile::NanFuture, Hostile::NanUnseen][number % 2],
        key_compression: CompressionKind::Mean,
        value_compression: CompressionKind::Mean,
        ..case(number)
    };
    check((0..10).map(hostile));
}

/// A backward of packed sequences, whose keys and values are several groups of 64 rows, none of which begins with a sequence.
fn packed((window_size, topk): (usize, usize)) -> Case {
    Case {
        query_lens: vec![150, 0, 33, 200],
        kv_lens: vec![150, 40, 161, 300],
        num_q_heads: 6,
        num_kv_heads: 2,
        head_dim: 128,
        value_dim: 128,
        config: NsaConfig { block_size: 16, topk, local_blocks: 1, window_size, ..NsaConfig::default() },
        ..Case::new(Stage::Nsa, Pass::Backward, DType::Bf16)
    }
}

/// A window of nothing but the row itself, and one longer than the sequence; more blocks listed than there are, and one.
#[test]
#[ignore = "needs a CUDA device"]
fn windows_and_lists_of_any_length_conform() {
    check([(0, 2), (1000, 2), (40, 20), (128, 5), (usize::MAX >> 1, 3)].map(packed));
}

/// Values that are not finite, which the launch that opens the sums finds, and lists of two words, with more ids than a warp has lanes.
#[test]
#[ignore = "needs a CUDA device"]
fn values_of_any_group_and_long_lists_conform() {
    let hostile = |case: Case, hostile| Case {
        hostile,
        key_compression: CompressionKind::Mean,
        value_compression: CompressionKind::Mean,
        ..case
    };
    let long = Case { query_lens: vec![90, 40], kv_lens: vec![700, 40], ..packed((64, 40)) };
    let cases = [packed((40, 3)), packed((0, 20)), long.clone()];
    check(
        cases.into_iter().flat_map(|case| [Hostile::NanFuture, Hostile::NanUnseen].map(|of| hostile(case.clone(), of))),
    );
    check([long]);
}

/// Tiles of keys in one split and in several: all blocks listed and few, groups of one and of all heads.
#[test]
#[ignore = "needs a CUDA device"]
fn any_number_of_splits_conforms() {
    let of = |(query, keys, num_q_heads, num_kv_heads, topk): (usize, usize, usize, usize, usize)| Case {
        query_lens: vec![query],
        kv_lens: vec![keys],
        num_q_heads,
        num_kv_heads,
        head_dim: 128,
        value_dim: 128,
        config: NsaConfig { block_size: 32, topk, local_blocks: 1, window_size: 150, ..NsaConfig::default() },
        ..Case::new(Stage::Nsa, Pass::Backward, DType::Bf16)
    };
    let calls =
        [(700, 700, 4, 1, 30), (700, 700, 4, 1, 5), (300, 900, 2, 2, 6), (513, 513, 16, 1, 4), (290, 290, 5, 1, 9)];
    check(calls.map(of));
}
