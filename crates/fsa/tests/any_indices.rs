//! Any i32 in `topk_indices` is safe: ids that name no block of the row's past count as absent.

mod fixture;

use fixture::{Inputs, KV_HEADS, LENGTHS, Q_HEADS, TOTAL, VALUE_DIM, engine, filled};
use fsa::{AttentionGradTensors, AttentionResult, DType, Selection, Tensor};
use proptest::prelude::*;

const TOPK: usize = 4;
const BLOCK_SIZE: usize = 16;

/// Ids near the border of what exists as often as absurd ones.
fn any_id() -> impl Strategy<Value = i32> {
    prop_oneof![4 => -2i32..6, 1 => any::<i32>(), 1 => Just(i32::MIN), 1 => Just(i32::MAX)]
}

/// Position of every row in its own sequence.
fn positions() -> impl Iterator<Item = usize> {
    LENGTHS.into_iter().flat_map(|length| 0..length)
}

/// Forward and backward with the blocks that `ids` list.
fn run(ids: Vec<i32>) -> (AttentionResult, AttentionGradTensors) {
    let (engine, inputs) = (engine(), Inputs::new());
    let topk_indices = Tensor::new("topk_indices", ids, &[KV_HEADS, TOTAL, TOPK]).expect("shape");
    let selection = Selection { topk_indices: topk_indices.view(), block_size: BLOCK_SIZE, validate: false };
    let forward = engine.selected(&inputs.attention(), &selection).expect("safe");
    let grad_out = filled("grad_out", DType::F32, &[TOTAL, Q_HEADS, VALUE_DIM]);
    let grad = forward.grad_args(grad_out.view());
    let grads = engine.selected_backward(&inputs.attention(), &selection, &grad).expect("safe");
    (forward, grads)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn absurd_ids_count_as_absent(ids in proptest::collection::vec(any_id(), KV_HEADS * TOTAL * TOPK)) {
        let (mut any, mut cleaned) = (ids.clone(), ids);
        for head in 0..KV_HEADS {
            for (row, position) in positions().enumerate() {
                let start = (head * TOTAL + row) * TOPK;
                for slot in start..start + TOPK {
                    // A block listed twice breaks the contract; what it would weigh is not defined.
                    if any[slot] >= 0 && any[start..slot].contains(&any[slot]) {
                        any[slot] = i32::MAX - slot as i32;
                    }
                    let exists = (0..=(position / BLOCK_SIZE) as i32).contains(&any[slot]);
                    cleaned[slot] = if exists { any[slot] } else { -1 };
                }
            }
        }
        prop_assert_eq!(run(any), run(cleaned));
    }

    #[test]
    fn blocks_listed_twice_are_safe(ids in proptest::collection::vec(any_id(), KV_HEADS * TOTAL * TOPK)) {
        let (forward, grads) = run(ids);
        for tensor in [&forward.out, &grads.grad_query, &grads.grad_key, &grads.grad_value] {
            prop_assert!(tensor.view().to_f64().iter().all(|value| value.is_finite()));
        }
    }
}
