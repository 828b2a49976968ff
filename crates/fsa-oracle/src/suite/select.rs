//! Check of stage `select`: compressed attention under the tolerance rule, ids as far as rounding leaves them decided.

use super::attention::outputs;
use super::check::Check;
use crate::arithmetic::Exact;
use crate::attention::{AttentionInputs, places};
use crate::buffer::Buffer;
use crate::case::Case;
use crate::inputs::AttentionData;
use crate::select::{self, BoundedScores};
use crate::{attention, select::is_forced};
use fsa_core::{AttentionOutput, Backend, DType, NsaConfig, Result, SelectArgs, TensorView};

pub(super) fn forward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = AttentionData::new(case)?;
    let args = SelectArgs { attention: data.args()?, config: &case.config };
    let results = check.run(|| {
        let total_q = data.batch.total_q();
        let [mut out, mut lse] = outputs(case, total_q);
        let shape = [case.num_kv_heads, total_q, case.config.topk];
        let mut ids = Buffer::poisoned("topk_indices", DType::I32, &shape, case.layout);
        let mut output = AttentionOutput { out: out.view_mut()?, lse: lse.view_mut()? };
        backend.select(&args, &mut output, &mut ids.view_mut()?)?;
        Ok(vec![out, lse, ids])
    })?;
    let inputs = AttentionInputs::new(&args.attention);
    let visible = attention::visible(&args.stage(), &data.batch)?;
    check.compare(&results[..2], |a| {
        let forward = attention::forward(a, &inputs, &*visible);
        vec![forward.out, forward.lse]
    })?;
    check_ids(check, &inputs, &case.config, &results[2].view()?)
}

/// Checks the selection that a backend made of `inputs` (query, compressed keys and values).
pub(super) fn check_ids(
    check: &mut Check<'_>,
    inputs: &AttentionInputs<'_>,
    config: &NsaConfig,
    topk_indices: &TensorView<'_>,
) -> Result<()> {
    let ids = topk_indices.typed::<i32>("topk_indices")?;
    let selection = select::forward(&Exact, inputs, config)?;
    let (mut decided, mut ambiguous) = (0, 0);
    for kv_head in 0..inputs.key.shape()[1] {
        for place in places(inputs.batch, kv_head) {
            let row: Vec<i32> = (0..config.topk).map(|slot| ids.at(&[kv_head, place.row, slot])).collect();
            let candidates = place.position / config.block_size + 1;
            let bounded = BoundedScores::new(inputs, &selection, config, &place);
            let verdicts = bounded.verdicts(config);
            match bounded.scores.iter().any(|score| score.is_nan()) {
                true => {} // NaN has no order: the row must only be a selection.
                false if verdicts.contains(&None) => ambiguous += 1,
                false => decided += 1,
            }
            let wrong = broken_rule(&row, candidates, config).or_else(|| wrong_id(&row, &verdicts, &bounded));
            if let Some(wrong) = wrong {
                check.fail(format!("topk_indices[{kv_head}, {}] = {row:?}: {wrong}", place.row));
            }
        }
    }
    check.count_rows(decided, ambiguous);
    Ok(())
}

/// The rules that hold whatever the scores.
fn broken_rule(row: &[i32], candidates: usize, config: &NsaConfig) -> Option<String> {
    let count = config.topk.min(candidates);
    let (listed, rest) = row.split_at(count);
    if rest.iter().any(|id| *id != -1) || listed.iter().any(|id| *id < 0 || *id as usize >= candidates) {
        return Some(format!("expected {count} blocks of 0..{candidates}, then -1"));
    }
    if listed.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Some("expected ascending ids".into());
    }
    let missing =
        (0..candidates).find(|block| is_forced(*block, candidates, config) && !listed.contains(&(*block as i32)));
    missing.map(|block| format!("block {block} is forced and missing"))
}

fn wrong_id(row: &[i32], verdicts: &[Option<bool>], bounded: &BoundedScores) -> Option<String> {
    let wrong = verdicts
        .iter()
        .enumerate()
        .find(|(block, verdict)| verdict.is_some_and(|listed| listed != row.contains(&(*block as i32))));
    wrong.map(|(block, verdict)| {
        let word = if *verdict == Some(true) { "missing" } else { "too many" };
        format!("block {block} is {word}, scores {:?}, errors at most {:?}", bounded.scores, bounded.errors)
    })
}
