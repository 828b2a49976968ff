//! The forward of the whole where rows list all blocks that they see, on a GPU: Hopper's kernel walks the window, all keys and the compressed keys of a tile
//! one after the other.

use fsa_core::{DType, NsaConfig, Stage};
use fsa_cuda::{CudaBackend, Environment};
use fsa_oracle::case::{CompressionKind, RopeKind};
use fsa_oracle::suite::Trial;
use fsa_oracle::{Case, Hostile, Pass};

const HOSTILE: [Hostile; 6] = [
    Hostile::None,
    Hostile::NanFuture,
    Hostile::NanUnseen,
    Hostile::LogitOffset,
    Hostile::Peaked,
    Hostile::SignedGates,
];

fn check(cases: impl IntoIterator<Item = Case>) {
    let environment = Environment::read().expect("valid");
    let backend = CudaBackend::with(&environment).expect("a device");
    let trial = Trial::new(&backend);
    for case in cases {
        let outcome = trial.run_case(&case);
        assert!(outcome.passed(), "{case}: {outcome:#?}");
    }
}

/// Packed sequences: one without tokens, one without rows, shorter than a window of compression, with fewer rows than keys, of one row.
fn packed(hostile: Hostile) -> Case {
    Case {
        query_lens: vec![150, 0, 0, 20, 120, 1],
        kv_lens: vec![150, 0, 40, 20, 300, 33],
        head_dim: 128,
        value_dim: 128,
        config: NsaConfig { window_size: 100, ..NsaConfig::default() },
        hostile,
        ..Case::new(Stage::Nsa, Pass::Forward, DType::Bf16)
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn groups_of_any_size_conform() {
    let of = |hostile, [num_q_heads, num_kv_heads]: [usize; 2]| Case { num_q_heads, num_kv_heads, ..packed(hostile) };
    let heads = [[2, 2], [6, 2], [5, 1], [16, 1], [8, 2]];
    check(HOSTILE.iter().flat_map(|hostile| heads.map(|heads| of(*hostile, heads))));
}

#[test]
#[ignore = "needs a CUDA device"]
fn windows_of_any_size_conform() {
    let of = |(window_size, hostile): (usize, Hostile)| Case {
        config: NsaConfig { window_size, ..NsaConfig::default() },
        ..packed(hostile)
    };
    let sizes = [0, 1, 31, 300, usize::MAX >> 1];
    check(sizes.iter().flat_map(|size| [Hostile::None, Hostile::NanFuture].map(|hostile| of((*size, hostile)))));
}

/// Compressed keys that depend on parameters, that are rotated, or of other windows: whatever is ahead of attention.
#[test]
#[ignore = "needs a CUDA device"]
fn compressions_of_any_kind_conform() {
    let kinds = [CompressionKind::Mean, CompressionKind::Weighted, CompressionKind::LinearPosition];
    let ropes = [RopeKind::None, RopeKind::Default];
    let of = |key_compression, value_compression, rope, (kernel_size, kernel_stride)| {
        let config = NsaConfig { kernel_size, kernel_stride, ..packed(Hostile::None).config };
        Case { key_compression, value_compression, rope, config, ..packed(Hostile::None) }
    };
    for key in kinds {
        for value in kinds {
            check(ropes.into_iter().flat_map(|rope| [(32, 16), (16, 16)].map(|sizes| of(key, value, rope, sizes))));
        }
    }
}

/// Other sizes of vectors, f16, and calls of more compressed keys than a step has.
#[test]
#[ignore = "needs a CUDA device"]
fn vectors_and_lengths_of_any_size_conform() {
    let of = |(head_dim, dtype, hostile)| Case { head_dim, value_dim: head_dim, dtype, ..packed(hostile) };
    for dtype in [DType::Bf16, DType::F16] {
        let hostile = [Hostile::None, Hostile::NanFuture];
        check([40, 64, 96, 128].into_iter().flat_map(|dim| hostile.map(|hostile| of((dim, dtype, hostile)))));
    }
    let long = |hostile| Case {
        query_lens: vec![90, 200],
        kv_lens: vec![1000, 2000],
        config: NsaConfig { topk: 48, ..NsaConfig::default() },
        ..packed(hostile)
    };
    check([Hostile::None, Hostile::NanUnseen, Hostile::NanFuture].map(long));
}
