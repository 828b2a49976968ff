use super::*;
use crate::dtype::DType;

fn shape(total_q: usize, total_keys: usize, heads: [usize; 2]) -> AttentionShape {
    let (num_q_heads, num_kv_heads) = (heads[0], heads[1]);
    AttentionShape { total_q, total_keys, num_q_heads, num_kv_heads, head_dim: 64, value_dim: 64, dtype: DType::F32 }
}

fn plan(length: usize, workers: usize) -> Plan {
    let (batch, config) = (Batch::single(length), NsaConfig::default());
    let shape = shape(length, length, [8, 2]);
    Plan::new(&PlanInput { shape, batch: &batch, config: &config, linear_compression: false, rope: false, workers })
        .expect("valid")
}

#[test]
fn pairs_equal_a_count_by_hand() {
    let config = NsaConfig { topk: 4, window_size: 30, ..NsaConfig::default() };
    for (q_len, kv_len) in [(1, 1), (200, 200), (70, 333), (0, 64)] {
        let batch = Batch::from_cu_seqlens(&[0, q_len], &[0, kv_len]).expect("valid");
        let sequence = &batch.sequences()[0];
        let count = |sees: &dyn Fn(usize, usize) -> bool| {
            let positions = (kv_len - q_len) as usize..kv_len as usize;
            positions.flat_map(|p| (0..kv_len as usize).map(move |k| (p, k))).filter(|(p, k)| sees(*p, *k)).count()
                as f64
        };
        assert_eq!(pairs(Stage::Dense, sequence, &config), count(&|p, k| k <= p));
        assert_eq!(pairs(Stage::Window, sequence, &config), count(&|p, k| k <= p && k + 30 >= p));
        // Any selection of the last min(topk, own + 1) blocks has the right number of keys.
        let selected = count(&|p, k| k <= p && k / 64 + 4 > p / 64);
        assert_eq!(pairs(Stage::Selected, sequence, &config), selected);
        let windows = sequence.num_compressed(32, 16);
        let compressed = count(&|p, i| i < windows && i * 16 + 31 <= p);
        assert_eq!(pairs(Stage::Compressed, sequence, &config), compressed);
    }
}

#[test]
fn workspace_does_not_grow_with_rows_times_blocks() {
    let sizes: Vec<usize> = [1 << 14, 1 << 17, 1 << 20].map(|n| plan(n, 2).forward_workspace_bytes()).into();
    assert!(sizes.iter().all(|bytes| *bytes < 64 << 20), "{sizes:?}");
}

#[test]
fn tiles_do_not_depend_on_the_workers() {
    let (one, many) = (plan(5000, 1), plan(5000, 64));
    for (a, b) in one.stages.iter().zip(&many.stages) {
        assert_eq!((&a.tile, a.work_items), (&b.tile, b.work_items));
    }
}

#[test]
fn a_plan_prints_every_stage_and_serialises() {
    let plan = plan(32_768, 2);
    let text = plan.to_string();
    for stage in &plan.stages {
        assert!(text.contains(stage.stage.name()), "{text}");
    }
    let json = serde_json::to_value(&plan).expect("serialises");
    assert_eq!(json["stages"][0]["stage"], "compress");
    assert!(plan.dense.cost.forward_flops / plan.cost().forward_flops > 5.0);
}
