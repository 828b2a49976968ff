//! Compressed attention that chooses blocks of one sequence with few keys, on a GPU: alone, before the one walk, and with gates of its own; and the whole
//! where rows that list all blocks that they see are attended to apart.

use fsa_core::{DType, NsaConfig, Stage};
use fsa_cuda::plan::{Route, Routing};
use fsa_cuda::{CudaBackend, Environment};
use fsa_oracle::suite::Trial;
use fsa_oracle::{Case, Hostile, Pass};

/// Every call twice, with equal bits: the stage by itself and the whole, by every route.
fn check(cases: impl IntoIterator<Item = Case>) {
    let backends = Route::ALL.map(|route| {
        let environment = Environment { routing: Routing::Always(route), ..Environment::read().expect("valid") };
        CudaBackend::with(&environment).expect("a device")
    });
    for case in cases {
        for (number, backend) in backends.iter().enumerate() {
            for stage in [Stage::Select, Stage::Nsa] {
                if stage == Stage::Select && number > 0 {
                    continue;
                }
                let case = Case { stage, ..case.clone() };
                let outcome = Trial::new(backend).run_case(&case);
                assert!(outcome.passed(), "{case}: {outcome:#?}");
            }
        }
    }
}

/// One sequence of 32 blocks, of which rows list 6.
fn case(dtype: DType, [query_len, kv_len]: [usize; 2]) -> Case {
    let config = NsaConfig {
        kernel_size: 8,
        kernel_stride: 4,
        block_size: 16,
        topk: 6,
        window_size: 70,
        ..NsaConfig::default()
    };
    Case {
        query_lens: vec![query_len],
        kv_lens: vec![kv_len],
        num_q_heads: 8,
        num_kv_heads: 2,
        head_dim: 128,
        value_dim: 128,
        config,
        ..Case::new(Stage::Select, Pass::Forward, dtype)
    }
}

/// Tiles that lack tokens, warps that lack some and that lack all, rows that see no compressed key, sequences without any or without room for one; the last
/// length has more blocks.
#[test]
#[ignore = "needs a CUDA device"]
fn sequences_of_any_length_conform() {
    let lengths = [
        [512, 512],
        [511, 511],
        [300, 300],
        [97, 512],
        [1, 512],
        [5, 403],
        [130, 130],
        [7, 7],
        [3, 3],
        [1, 2],
        [200, 513],
    ];
    for dtype in [DType::Bf16, DType::F16] {
        check(lengths.map(|lengths| case(dtype, lengths)));
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn groups_dims_and_windows_of_any_size_conform() {
    let usual = case(DType::Bf16, [450, 500]);
    check([(3, 3), (4, 2), (8, 1), (16, 1), (5, 1)].map(|(num_q_heads, num_kv_heads)| Case {
        num_q_heads,
        num_kv_heads,
        ..usual.clone()
    }));
    check([64, 80, 96].map(|dim| Case { head_dim: dim, value_dim: dim, ..usual.clone() }));
    let lists = [(1, 0, 0), (1, 0, 1), (2, 1, 1), (7, 3, 1), (9, 0, 5), (31, 0, 0), (40, 20, 20)];
    check(lists.map(|(topk, init_blocks, local_blocks)| Case {
        config: NsaConfig { topk, init_blocks, local_blocks, ..usual.config },
        ..usual.clone()
    }));
    check([(4, 4, 16), (8, 8, 32), (32, 16, 64)].map(|(kernel_size, kernel_stride, block_size)| Case {
        config: NsaConfig { kernel_size, kernel_stride, block_size, topk: 4, ..usual.config },
        ..usual.clone()
    }));
}

#[test]
#[ignore = "needs a CUDA device"]
fn hostile_cases_conform() {
    for dtype in [DType::Bf16, DType::F16] {
        let usual = case(dtype, [512, 512]);
        let kinds = [Hostile::NanFuture, Hostile::NanUnseen, Hostile::LogitOffset, Hostile::Huge, Hostile::Peaked];
        check(kinds.map(|hostile| Case { hostile, ..usual.clone() }));
        check([0.0, 3.0].map(|scale| Case { softmax_scale: Some(scale), ..usual.clone() }));
    }
}

/// Enough heads that the first rows are work for every multiprocessor; the others leave room beside them in some cases, not in others. The backward reads
/// what both have saved.
#[test]
#[ignore = "needs a CUDA device"]
fn rows_that_list_all_blocks_conform_apart() {
    let environment =
        Environment { routing: Routing::Always(Route::DenseMasked), ..Environment::read().expect("valid") };
    let backend = CudaBackend::with(&environment).expect("a device");
    let cases = [
        (DType::Bf16, 68, 17, 300, Hostile::None),
        (DType::F16, 68, 17, 300, Hostile::NanFuture),
        (DType::Bf16, 68, 17, 400, Hostile::None),
        (DType::F16, 66, 66, 300, Hostile::None),
        (DType::Bf16, 80, 5, 270, Hostile::NanFuture),
    ];
    let run = |(dtype, num_q_heads, num_kv_heads, tokens, hostile), pass| {
        let usual = case(dtype, [tokens; 2]);
        let config = NsaConfig { topk: 16, ..usual.config };
        let (stage, head_dim, value_dim) = (Stage::Nsa, 64, 64);
        let case = Case { stage, pass, hostile, num_q_heads, num_kv_heads, head_dim, value_dim, config, ..usual };
        let outcome = Trial::new(&backend).run_case(&case);
        assert!(outcome.passed(), "{case}: {outcome:#?}");
    };
    // The results in f64 take seconds each.
    std::thread::scope(|threads| {
        for case in cases {
            for pass in [Pass::Forward, Pass::Backward] {
                threads.spawn(move || run(case, pass));
            }
        }
    });
}
