//! On a GPU: attention to windows whose steps of keys have each of the sizes that a plan chooses between, with NaN and infinity beside
//! the window, too.

use fsa_core::{DType, NsaConfig, Stage};
use fsa_cuda::CudaBackend;
use fsa_oracle::suite::run_case;
use fsa_oracle::{Case, Hostile, Pass};

#[test]
#[ignore = "needs a CUDA device"]
fn windows_of_all_steps_conform() {
    let backend = CudaBackend::new().expect("a device");
    for (number, group) in [1, 2, 4, 5, 16].into_iter().enumerate() {
        for (window_size, hostile) in
            [(512, Hostile::None), (512, Hostile::NanFuture), (100, Hostile::NanUnseen), (0, Hostile::None)]
        {
            let case = Case {
                query_lens: vec![700, 0, 130],
                kv_lens: vec![740, 50, 900],
                num_q_heads: group,
                num_kv_heads: 1,
                head_dim: 128 - 32 * (number % 3),
                value_dim: 128 - 32 * (number % 3),
                config: NsaConfig { window_size, ..NsaConfig::default() },
                hostile,
                ..Case::new(Stage::Window, Pass::Forward, [DType::Bf16, DType::F16][number % 2])
            };
            let outcome = run_case(&backend, &case);
            assert!(outcome.passed(), "{outcome:#?}");
        }
    }
}
