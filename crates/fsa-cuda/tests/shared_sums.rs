//! On a GPU: the gradient of a query through all branches of the whole, added up in one scaled sum, is that through each of
//! them, added up in f32, whatever the magnitudes of the branches; and the backward that does so conforms.

mod noise;

use fsa_core::{Backend, Batch, Compression, DType, NsaArgs, NsaConfig, NsaGrads, Stage, Tensor};
use fsa_cuda::plan::{QuerySums, Route, Routing};
use fsa_cuda::{CudaBackend, Environment};
use fsa_oracle::generate::generate;
use fsa_oracle::suite::Trial;
use fsa_oracle::{Case, Pass};
use noise::noise;
use std::sync::Arc;

const HEADS: [usize; 2] = [4, 2];
const DIM: usize = 128;
const SCALE: f32 = 0.088;
const ROUTES: [Route; 2] = [Route::KvOuter, Route::DenseMasked];

fn backend(route: Route, query_sums: Option<QuerySums>) -> Arc<CudaBackend> {
    let environment =
        Environment { routing: Routing::Always(route), query_sums, ..Environment::read().expect("valid") };
    CudaBackend::with(&environment).and_then(|backend| backend.unordered()).expect("a device")
}

/// Generated backwards of the whole with vectors of 128 by the route that few short calls take.
#[test]
#[ignore = "needs a CUDA device"]
fn generated_cases_conform() {
    let backend = backend(Route::KvOuter, None);
    for number in 0..30 {
        let case = generate(Stage::Nsa, Pass::Backward, DType::Bf16, 3, number);
        // Once: sums in any order promise no bits.
        let trial = Trial::new(&*backend).calls(1);
        let outcome = trial.run_case(&Case { head_dim: DIM, value_dim: DIM, ..case });
        assert!(outcome.passed(), "{outcome:#?}");
    }
}

/// query, key, value, grad_out and gates of two sequences, one with fewer rows than keys.
#[derive(Clone)]
struct Call {
    batch: Batch,
    config: NsaConfig,
    inputs: [Vec<f32>; 5],
}

/// Sizes of the finite elements.
fn sizes(of: &[f32]) -> impl Iterator<Item = f64> + '_ {
    of.iter().filter(|x| x.is_finite()).map(|x| f64::from(x.abs()))
}

fn largest(of: &[f32]) -> f64 {
    sizes(of).fold(0.0, f64::max)
}

fn sum(of: &[f32]) -> f64 {
    sizes(of).sum()
}

impl Call {
    fn new() -> Self {
        let batch = Batch::from_cu_seqlens(&[0, 210, 330], &[0, 210, 510]).expect("valid");
        let [rows, keys] = [batch.total_q(), batch.total_kv()];
        let windows = NsaConfig { kernel_size: 16, kernel_stride: 16, window_size: 70, ..NsaConfig::default() };
        let config = NsaConfig { block_size: 16, topk: 4, init_blocks: 1, local_blocks: 1, ..windows };
        let sizes = [rows * HEADS[0] * DIM, keys * HEADS[1] * DIM, keys * HEADS[1] * DIM, rows * HEADS[0] * DIM];
        let mut seed = 0;
        let inputs = [sizes[0], sizes[1], sizes[2], sizes[3], rows * HEADS[0] * 3].map(|size| {
            seed += 1;
            noise(size, seed).iter().map(|x| x.to_f32()).collect()
        });
        Self { batch, config, inputs }
    }

    fn scaled(mut self, factors: [f32; 5]) -> Self {
        for (input, factor) in self.inputs.iter_mut().zip(factors) {
            input.iter_mut().for_each(|x| *x *= factor);
        }
        self
    }

    /// With the gates of the branches times factors.
    fn gated(mut self, factors: [f32; 3]) -> Self {
        self.inputs[4].chunks_mut(3).for_each(|gates| gates.iter_mut().zip(factors).for_each(|(x, y)| *x *= y));
        self
    }

    /// Gradients of query, key and value.
    fn gradients(&self, backend: &CudaBackend) -> [Vec<f64>; 3] {
        let [rows, keys] = [self.batch.total_q(), self.batch.total_kv()];
        let shapes = [
            [rows, HEADS[0], DIM],
            [keys, HEADS[1], DIM],
            [keys, HEADS[1], DIM],
            [rows, HEADS[0], DIM],
            [rows, HEADS[0], 3],
        ];
        let tensor = |i: usize| Tensor::from_f32("input", &self.inputs[i], DType::Bf16, &shapes[i]).expect("fits");
        let [query, key, value, grad_out, gates] = [0, 1, 2, 3, 4].map(tensor);
        let args = NsaArgs {
            query: query.view(),
            key: key.view(),
            value: value.view(),
            gates: gates.view(),
            batch: &self.batch,
            config: &self.config,
            key_compression: Compression::Mean,
            value_compression: Compression::Mean,
            rope: None,
            softmax_scale: Some(SCALE),
        };
        let zeros = |i: usize| Tensor::zeros("output", DType::Bf16, &shapes[i]).expect("fits");
        let [mut out, mut grad_query, mut grad_key, mut grad_value, mut grad_gates] = [0, 0, 1, 2, 4].map(zeros);
        let forward = backend.nsa(&args, &mut out.view_mut(), true).expect("runs");
        let mut grads = NsaGrads {
            grad_query: grad_query.view_mut(),
            grad_key: grad_key.view_mut(),
            grad_value: grad_value.view_mut(),
            grad_gates: grad_gates.view_mut(),
            key_compression: Default::default(),
            value_compression: Default::default(),
        };
        backend.nsa_backward(&args, &forward.saved.expect("asked for"), &grad_out.view(), &mut grads).expect("runs");
        [grad_query, grad_key, grad_value].map(|tensor| tensor.view().to_f64())
    }

    /// What one addition to the scaled sums is wrong by at most, however small the sum, for their numbers are 2^-24 apart at
    /// least and the bound of all branches is 2^12 of them or more: 2^-25 / 2^12 of the bound. That is at most
    /// 2 |gate| sum |grad_out| max |value| max |key| of each.
    fn least_error(&self) -> f64 {
        let [_, key, value, grad_out, gates] = &self.inputs;
        let rows = || grad_out.chunks(DIM).map(sum).zip(gates.chunks(3));
        let of_branch = |b: usize| rows().fold(0f64, |most, (sum, gates)| most.max(sum * f64::from(gates[b].abs())));
        let bound: f64 = [0, 1, 2].map(|b| 2.0 * of_branch(b) * largest(value) * largest(key)).iter().sum();
        f64::from(SCALE) * bound * 0.5f64.powi(37)
    }

    /// What the roundings of a row's delta come to: selected blocks and window in one pass have one delta for both, rounded once more and
    /// with its lowest bit for the sign of the gates, 2^-22 of it, and it is at most sum |grad_out| max |value|. It is all that there
    /// is of rows whose gradients are zero.
    fn delta_error(&self, row: usize) -> f64 {
        let [_, key, value, grad_out, gates] = &self.inputs;
        let gates = sum(&gates[3 * row..3 * row + 3]);
        let delta = sum(&grad_out[row * DIM..(row + 1) * DIM]) * largest(value);
        f64::from(SCALE) * gates * delta * largest(key) * 0.5f64.powi(22)
    }

    /// Requires both ways to agree but for roundings of the largest elements that each branch has in a row: one of the scaled
    /// sum to bf16 and three where every branch is rounded, 2^-9 each; of additions to f16, 2^-11 each, compressed attention
    /// has one, the window two, selected blocks four; of score gradients, where two branches are rounded together, 2^-9. All
    /// are below 2^-6.
    fn check(&self, name: &str) {
        let largest_of = |row: &[f64]| row.iter().filter(|x| x.is_finite()).fold(0f64, |most, x| most.max(x.abs()));
        for route in ROUTES {
            let in_f32 = backend(route, Some(QuerySums::F32));
            let [shared, exact] = [&backend(route, None), &in_f32].map(|backend| self.gradients(backend));
            let branches = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
                .map(|gates| self.clone().gated(gates).gradients(&in_f32));
            for (i, of) in ["query", "key", "value"].iter().enumerate() {
                let floor = if i == 0 { 7.0 * self.least_error() } else { largest_of(&exact[i]) * 0.5f64.powi(20) };
                for (row, (got, expected)) in shared[i].chunks(DIM).zip(exact[i].chunks(DIM)).enumerate() {
                    let of_row = |grads: &[Vec<f64>; 3]| largest_of(&grads[i][row * DIM..(row + 1) * DIM]);
                    let of_delta = if i == 0 { self.delta_error(row) } else { 0.0 };
                    let most = branches.iter().map(of_row).sum::<f64>() / 64.0 + floor + of_delta;
                    let fits = |(x, y): (&f64, &f64)| (x - y).abs() <= most || !x.is_finite() && !y.is_finite();
                    let wrong = got.iter().zip(expected).position(|pair| !fits(pair));
                    let pair = wrong.map(|at| (got[at], expected[at]));
                    assert_eq!(
                        wrong, None,
                        "{name}, {route:?}, grad_{of}, row {row}: {pair:?}, at most {most:e} apart"
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn sums_of_all_branches_are_those_of_each() {
    for (name, factors) in [
        ("plain", [1.0; 5]),
        ("no gradient", [1.0, 1.0, 1.0, 0.0, 1.0]),
        ("tiny gradient", [1.0, 1.0, 1.0, 1e-25, 1.0]),
        ("huge values and gradient", [1.0, 1.0, 1e12, 1e12, 1.0]),
        ("large logits", [30.0, 30.0, 1.0, 1.0, 1.0]),
    ] {
        Call::new().scaled(factors).check(name);
    }
    // With the factor of another branch these sums would leave the range of f16 by far.
    for (name, gates) in [
        ("window dominates", [1e-3, 1e-3, 1e3]),
        ("compressed dominates", [1e3, 1e-3, 1e-3]),
        ("selected dominates", [1e-3, 1e3, 1e-3]),
        ("window alone", [0.0, 0.0, 1.0]),
        ("compressed alone", [1.0, 0.0, 0.0]),
        ("selected alone", [0.0, 1.0, 0.0]),
    ] {
        Call::new().gated(gates).check(name);
    }
    // One row of one branch before all others.
    let mut call = Call::new();
    call.inputs[4][3 * HEADS[0] * 100] = 1e3;
    call.check("a gate");
    // What later rows see, what rows have themselves, and keys that no row sees.
    let mut call = Call::new();
    for (input, row, x) in [(1, 300, f32::NAN), (2, 600, f32::INFINITY), (0, 900, f32::NAN), (3, 40, f32::NEG_INFINITY)]
    {
        call.inputs[input][row * DIM + 5] = x;
    }
    call.check("not finite");
}

/// Every branch as near to its bound as can be: queries of zero attend to all keys alike, whose elements and values all have
/// one size and, like compressed ones, the sign of their window.
#[test]
#[ignore = "needs a CUDA device"]
fn bounds_that_are_attained_together_do_not_overflow() {
    let mut call = Call::new();
    let [query, key, value, grad_out, gates] = &mut call.inputs;
    query.fill(0.0);
    for (n, (key, value)) in key.iter_mut().zip(value).enumerate() {
        let sign = if (n / (HEADS[1] * DIM * call.config.kernel_size)).is_multiple_of(2) { 4.0 } else { -4.0 };
        (*key, *value) = (sign, sign);
    }
    grad_out.fill(2.0);
    gates.fill(1.0);
    call.check("bounds");
}
