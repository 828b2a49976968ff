//! Both routes of stage `selected` on a GPU: what no case of the conformance suite says of lists.

use fsa_core::{AttentionArgs, AttentionOutput, AttentionStage, Backend, Batch, DType, Tensor, TensorView};
use fsa_cuda::plan::{Route, Routing};
use fsa_cuda::{CudaBackend, Environment, KernelSet};

const TOKENS: usize = 300;
const HEADS: usize = 3;
const DIM: usize = 64;
const TOPK: usize = 4;
const BLOCK: usize = 32;

fn noise(rows: usize, heads: usize, seed: usize) -> Tensor {
    let value = |at: usize| ((at * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0;
    let values: Vec<f32> = (0..rows * heads * DIM).map(value).collect();
    Tensor::from_f32("noise", &values, DType::Bf16, &[rows, heads, DIM]).expect("sizes fit")
}

/// `out` and `lse` of lists, by a route and the kernels of a set.
fn run(route: Route, kernels: Option<KernelSet>, lists: &[i32]) -> [Vec<f64>; 2] {
    let environment = Environment { routing: Routing::Always(route), kernels, ..Environment::read().expect("valid") };
    let tokens = lists.len() / TOPK;
    let backend = CudaBackend::with(&environment).expect("a device");
    let batch = Batch::single(tokens);
    let [query, key, value] = [noise(tokens, HEADS, 1), noise(tokens, 1, 2), noise(tokens, 1, 3)];
    let (query, key, value) = (query.view(), key.view(), value.view());
    let args = AttentionArgs { query, key, value, batch: &batch, softmax_scale: None };
    let topk_indices = TensorView::new("topk_indices", lists, &[1, tokens, TOPK]).expect("sizes fit");
    let stage = AttentionStage::Selected { topk_indices, block_size: BLOCK, validate: false };
    let mut out = Tensor::zeros("out", DType::Bf16, &[tokens, HEADS, DIM]).expect("small");
    let mut lse = Tensor::zeros("lse", DType::F32, &[HEADS, tokens]).expect("small");
    let mut output = AttentionOutput { out: out.view_mut(), lse: lse.view_mut() };
    backend.attention(&stage, &args, &mut output).expect("runs");
    [out, lse].map(|tensor| tensor.view().to_f64())
}

/// Four of the blocks that a row sees, or fewer.
fn lists() -> Vec<i32> {
    let ids = |row: usize| [0, 3 * row % 5, row / BLOCK / 2, row / BLOCK].map(|block| block as i32);
    let seen = |row: usize| {
        let mut ids: Vec<i32> = ids(row).into_iter().filter(|id| *id as usize <= row / BLOCK).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.resize(TOPK, -1);
        ids
    };
    (0..TOKENS).flat_map(seen).collect()
}

fn all_sets() -> [Option<KernelSet>; 2] {
    [None, Some(KernelSet::Sm80)]
}

/// Both routes give the same but for roundings, with the kernels of both sets.
fn assert_routes_agree(lists: &[i32]) {
    for set in all_sets() {
        let [a, b] = Route::ALL.map(|route| run(route, set, lists));
        for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
            assert!((a - b).abs() <= 0.02 * a.abs().max(1.0), "{a} {b}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn routes_agree() {
    assert_routes_agree(&lists());
}

/// Three blocks that all rows list have more units of 1024 rows than a launch has CTAs for: units of 1280, 1536 and 2048 rows.
#[test]
#[ignore = "needs a CUDA device"]
fn routes_agree_where_units_grow() {
    for tokens in [2560, 4096, 5000] {
        let own = |row: usize| row / BLOCK;
        let rows = (0..tokens)
            .map(|row| if own(row) > 3 { [1, 2, 3, own(row) as i32] } else { [own(row) as i32, -1, -1, -1] });
        assert_routes_agree(&rows.flatten().collect::<Vec<i32>>());
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_mask_counts_an_id_once_and_no_id_that_is_none() {
    for set in all_sets() {
        let plain = run(Route::DenseMasked, set, &lists());
        let absurd = [i32::MIN, -2, 10, 1 << 20, i32::MAX];
        let mut hostile = lists();
        for (row, list) in hostile.chunks_exact_mut(TOPK).enumerate() {
            let first = list[0];
            // Of what a row does not need, half is its first id once more and half is nothing that exists.
            for (place, id) in list.iter_mut().enumerate().filter(|(_, id)| **id < 0) {
                *id = if (row + place) % 2 == 0 { first } else { absurd[(row + place) % absurd.len()] };
            }
            list.rotate_left(row % TOPK);
        }
        assert_eq!(run(Route::DenseMasked, set, &hostile), plain);
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn rows_and_tiles_without_keys_are_zero() {
    for set in all_sets() {
        let mut lists = lists();
        lists[40 * TOPK..240 * TOPK].fill(-1);
        for route in Route::ALL {
            let [out, lse] = run(route, set, &lists);
            let empty = 40..240;
            assert!(out[40 * HEADS * DIM..240 * HEADS * DIM].iter().all(|x| *x == 0.0), "{route}");
            let is_right = |(at, lse): (usize, &f64)| (*lse == f64::NEG_INFINITY) == empty.contains(&(at % TOKENS));
            assert!(lse.iter().enumerate().all(is_right), "{route}");
        }
    }
}
