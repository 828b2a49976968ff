//! Partials of stage `selected` that Hopper's kernels pack into 12 bits an element, beside those of the portable kernels, which are as wide as
//! the tensors: values near the ends of f32, zeros, blocks of which one value is far larger than the others, and what is not finite.

use fsa_core::{AttentionArgs, AttentionOutput, AttentionStage, Backend, Batch, DType, Tensor, TensorView};
use fsa_cuda::plan::{Route, Routing};
use fsa_cuda::{CudaBackend, Environment, KernelSet};

const TOKENS: usize = 1500;
const HEADS: usize = 2;
const DIM: usize = 128;
const TOPK: usize = 8;
const BLOCK: usize = 64;

fn noise(row: usize, head: usize, column: usize, seed: usize) -> f32 {
    let at = (row * HEADS + head) * DIM + column;
    ((at * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0
}

fn tensor(heads: usize, value: impl Fn(usize, usize, usize) -> f32) -> Tensor {
    let at = |i: usize| value(i / DIM / heads, i / DIM % heads, i % DIM);
    let values: Vec<f32> = (0..TOKENS * heads * DIM).map(at).collect();
    Tensor::from_f32("values", &values, DType::Bf16, &[TOKENS, heads, DIM]).expect("sizes fit")
}

/// The first block, the last two, and five of those between them, other ones for every row.
fn lists() -> Vec<i32> {
    let of_row = |row: usize| {
        let own = row / BLOCK;
        let between = (0..5).map(|n| 1 + (row + 3 * n) % own.saturating_sub(2).max(1));
        let mut ids: Vec<i32> =
            [0, own.saturating_sub(1), own].into_iter().chain(between).map(|id| id as i32).collect();
        ids.retain(|id| *id as usize <= own);
        ids.sort_unstable();
        ids.dedup();
        ids.resize(TOPK, -1);
        ids
    };
    (0..TOKENS).flat_map(of_row).collect()
}

/// `out`; `sharpness` multiplies queries.
fn run(kernels: Option<KernelSet>, sharpness: f32, value: &Tensor) -> Vec<f64> {
    let routing = Routing::Always(Route::KvOuter);
    let environment = Environment { routing, kernels, ..Environment::read().expect("valid") };
    let backend = CudaBackend::with(&environment).expect("a device");
    let batch = Batch::single(TOKENS);
    let query = tensor(HEADS, |row, head, column| sharpness * noise(row, head, column, 1));
    let key = tensor(1, |row, head, column| noise(row, head, column, 2));
    let (query, key, value) = (query.view(), key.view(), value.view());
    let args = AttentionArgs { query, key, value, batch: &batch, softmax_scale: None };
    let lists = lists();
    let topk_indices = TensorView::new("topk_indices", &lists, &[1, TOKENS, TOPK]).expect("sizes fit");
    let stage = AttentionStage::Selected { topk_indices, block_size: BLOCK, validate: false };
    let mut out = Tensor::zeros("out", DType::Bf16, &[TOKENS, HEADS, DIM]).expect("small");
    let mut lse = Tensor::zeros("lse", DType::F32, &[HEADS, TOKENS]).expect("small");
    backend.attention(&stage, &args, &mut AttentionOutput { out: out.view_mut(), lse: lse.view_mut() }).expect("runs");
    out.view().to_f64()
}

/// Both sets give the same but for three roundings to bf16 each, of weights, partials and results, of which none is more than 2^-8 of the largest element of a row.
fn assert_sets_agree(sharpness: f32, value: &Tensor) {
    let [packed, wide] = [None, Some(KernelSet::Sm80)].map(|set| run(set, sharpness, value));
    for (row, (packed, wide)) in packed.chunks(DIM).zip(wide.chunks(DIM)).enumerate() {
        let largest = wide.iter().filter(|x| x.is_finite()).fold(0.0_f64, |most, x| most.max(x.abs()));
        for (column, (a, b)) in packed.iter().zip(wide).enumerate() {
            let same = if b.is_finite() {
                (a - b).abs() <= 6.0 / 256.0 * largest
            } else {
                a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
            };
            assert!(same, "row {row}, column {column}: {a}, not {b}; largest {largest}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn values_of_all_sizes_are_kept() {
    for powers in [[0, 0, 0, 0], [9, 12, -9, 5], [100, 60, -100, -60], [-110, -100, -112, -110], [120, 0, -120, 1]] {
        let value = tensor(1, |row, head, column| {
            let block = row / BLOCK;
            let size = if block % 5 == 4 { 0.0 } else { f32::powi(2.0, powers[block % 5]) };
            size * noise(row, head, column, 3)
        });
        assert_sets_agree(1.0, &value);
    }
}

/// Around the largest values that are packed without more ado, with sums of weights from one key's to those of a whole block.
#[test]
#[ignore = "needs a CUDA device"]
fn large_values_are_kept_at_any_sum_of_weights() {
    for sharpness in [0.0, 1.0, 100.0] {
        for size in [100.0, 255.0, 300.0, 1000.0, 1014.0, 1030.0, 5000.0] {
            let sign = |row: usize| if row.is_multiple_of(7) { -1.0 } else { 1.0 };
            assert_sets_agree(
                sharpness,
                &tensor(1, |row, head, column| size * sign(row) * (1.0 + noise(row, head, column, 3) / 64.0)),
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn one_large_value_leaves_the_others_of_its_block() {
    let value = tensor(1, |row, head, column| {
        let is_large = row % BLOCK == 5 && column % 32 == 7;
        noise(row, head, column, 3) * if is_large { 500.0 } else { 1.0 }
    });
    assert_sets_agree(1.0, &value);
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_is_not_finite_stays_where_it_is() {
    let value = tensor(1, |row, head, column| match (row, column) {
        (70, 5) => f32::NAN,
        (200, 7) => f32::INFINITY,
        (201, 9) => f32::NEG_INFINITY,
        (400, _) if column % 2 == 0 => f32::INFINITY,
        (500..510, _) => f32::powi(2.0, 120) * noise(row, head, column, 3),
        _ => noise(row, head, column, 3),
    });
    assert_sets_agree(1.0, &value);
}
