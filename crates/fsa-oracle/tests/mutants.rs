//! The suite must catch what is wrong: backends with one broken stage each, and where each is caught.

use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Backend, CombineArgs,
    CombineGrads, CompressArgs, CompressGrads, DType, NsaArgs, NsaConfig, NsaForward, NsaGrads, NsaSaved, Result,
    RopeArgs, SelectArgs, Stage, Tensor, TensorView, TensorViewMut,
};
use fsa_oracle::Pass;
use fsa_oracle::arithmetic::Rounded;
use fsa_oracle::array::Array;
use fsa_oracle::attention::{self, AttentionForward, AttentionInputs, Place, Visible, places};
use fsa_oracle::naive::{NaiveBackend, write};
use fsa_oracle::suite::{CheckOptions, run};
use fsa_oracle::{score, select};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// A row sees the key after its last.
    LateEdge,
    /// A row does not see its last key.
    EarlyEdge,
    /// A row that sees several blocks misses the last of them.
    DroppedBlock,
    /// Two halves of the keys are merged by 2^lse.
    BaseTwoMerge,
    /// `lse` in units of log2.
    BaseTwoLse,
    /// The last row is not written.
    UnwrittenRow,
    /// Keys that a row does not see count 0 times.
    NanLeak,
    /// `softmax_scale` is ignored.
    IgnoredScale,
    /// The gradients of key and value come from the first head of the group.
    OneHeadOfGroup,
    /// The gradient of `lse` is ignored.
    IgnoredGradLse,
    /// Equal scores go to the higher id.
    TieToHigher,
    /// All weights of a score are 1.
    FlatScores,
    /// Forced blocks are not forced.
    NothingForced,
    /// The mean is taken over one token too few.
    ShortMean,
    /// The gradient of the input is not written back: all zeros.
    NoGradInput,
    /// Angles computed in f32: wrong far from the origin.
    CoarseAngle,
    /// The gates of selected and window branch are swapped.
    SwappedGates,
    /// The gradient of a gate that all heads share is their mean instead of their sum.
    GateOfOneHead,
    /// The whole operation does not rotate.
    NoRope,
    /// The backward of the whole operation takes another selection than its forward.
    StaleState,
    /// The second call gives other bits.
    Unrepeatable,
    /// The backend panics on a sequence without queries.
    Panic,
}

struct Mutant {
    fault: Fault,
    calls: AtomicUsize,
}

impl Mutant {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// The visible keys of `stage` with this mutant's edge.
    fn visible<'v>(&self, stage: &AttentionStage<'v>, args: &AttentionArgs<'_>) -> Result<Box<Visible<'v>>> {
        let visible = attention::visible(stage, args.batch)?;
        let (fault, total) = (self.fault, args.key.shape()[0]);
        let block_size = match stage {
            AttentionStage::Selected { block_size, .. } => *block_size,
            _ => usize::MAX,
        };
        Ok(Box::new(move |place: &Place<'_>| {
            let mut keys = visible(place);
            let block = |key: &usize| key.saturating_sub(place.sequence.kv_rows.start) / block_size;
            match fault {
                Fault::LateEdge => keys.extend(keys.last().map(|key| key + 1).filter(|key| *key < total)),
                Fault::EarlyEdge => drop(keys.pop()),
                Fault::DroppedBlock => {
                    let (first, last) = (keys.first().map(block), keys.last().map(block));
                    keys.retain(|key| first == last || Some(block(key)) != last);
                }
                _ => {}
            }
            keys
        }))
    }

    fn forward(&self, stage: &AttentionStage<'_>, args: &AttentionArgs<'_>) -> Result<AttentionForward> {
        let (a, inputs) = (Rounded(args.query.dtype()), AttentionInputs::new(args));
        let visible = self.visible(stage, args)?;
        if self.is(Fault::BaseTwoMerge) {
            let half = |odd: usize| {
                attention::forward(&a, &inputs, &|place: &Place<'_>| {
                    visible(place).into_iter().filter(|key| key % 2 == odd).collect()
                })
            };
            return Ok(merge_in_base_two(half(0), &half(1)));
        }
        let mut forward = attention::forward(&a, &inputs, &*visible);
        match self.fault {
            Fault::BaseTwoLse => forward.lse = forward.lse.map(|lse| lse * std::f64::consts::LOG2_E),
            Fault::NanLeak => leak(&mut forward.out, &inputs),
            _ => {}
        }
        Ok(forward)
    }
}

fn merge_in_base_two(mut a: AttentionForward, b: &AttentionForward) -> AttentionForward {
    let (total_q, heads) = (a.out.shape()[0], a.out.shape()[1]);
    for row in 0..total_q {
        for head in 0..heads {
            let (x, y) = (a.lse.at(&[head, row]), b.lse.at(&[head, row]));
            let max = x.max(y);
            if max == f64::NEG_INFINITY {
                continue;
            }
            let (wx, wy) = ((x - max).exp2(), (y - max).exp2());
            for (o, p) in a.out.row_mut(&[row, head]).iter_mut().zip(b.out.row(&[row, head])) {
                *o = (wx * *o + wy * p) / (wx + wy);
            }
            *a.lse.at_mut(&[head, row]) = max + ((x - max).exp() + (y - max).exp()).ln();
        }
    }
    a
}

/// Adds 0 times every value of the sequence, as a product of a whole tile does.
fn leak(out: &mut Array, inputs: &AttentionInputs<'_>) {
    for kv_head in 0..inputs.key.shape()[1] {
        for place in places(inputs.batch, kv_head) {
            for key in place.sequence.kv_rows.clone().filter(|key| *key < inputs.value.shape()[0]) {
                for head in kv_head * inputs.gqa_group_size()..(kv_head + 1) * inputs.gqa_group_size() {
                    let value = inputs.value.row(&[key, kv_head]);
                    out.row_mut(&[place.row, head]).iter_mut().zip(value).for_each(|(o, v)| *o += 0.0 * v);
                }
            }
        }
    }
}

/// Writes all rows but the last.
fn write_but_last(target: &mut TensorViewMut<'_>, array: &Array) -> Result<()> {
    let (rows, heads) = (array.shape()[0], array.shape()[1]);
    let mut typed = target.typed::<f32>("out")?;
    for row in 0..rows.saturating_sub(1) {
        for head in 0..heads {
            let values: Vec<f32> = array.row(&[row, head]).iter().map(|v| *v as f32).collect();
            typed.store_row(&[row, head], &values);
        }
    }
    Ok(())
}

impl Backend for Mutant {
    fn name(&self) -> &'static str {
        "mutant"
    }

    fn attention(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        assert!(
            !self.is(Fault::Panic) || args.batch.sequences().iter().all(|s| s.query_len() > 0),
            "an empty sequence"
        );
        let softmax_scale = if self.is(Fault::IgnoredScale) { None } else { args.softmax_scale };
        let args = &AttentionArgs { softmax_scale, ..*args };
        let mut forward = self.forward(stage, args)?;
        if self.is(Fault::Unrepeatable) && self.calls.fetch_add(1, Ordering::Relaxed) % 2 == 1 {
            forward.out = forward.out.map(|v| v * (1.0 + f64::from(f32::EPSILON)));
        }
        write(&mut output.lse, &forward.lse)?;
        match self.fault {
            Fault::UnwrittenRow => write_but_last(&mut output.out, &forward.out),
            _ => write(&mut output.out, &forward.out),
        }
    }

    fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        let (a, inputs) = (Rounded(args.query.dtype()), AttentionInputs::new(args));
        let forward = self.forward(stage, args)?;
        let mut grad_out = Array::from_view(&grad.grad_out);
        let grad_lse = grad.grad_lse.as_ref().filter(|_| !self.is(Fault::IgnoredGradLse)).map(Array::from_view);
        let result = attention::backward(&a, &inputs, &forward, &grad_out, grad_lse.as_ref());
        write(&mut grads.grad_query, &result.query)?;
        let mut result = result;
        if self.is(Fault::OneHeadOfGroup) {
            for row in 0..grad_out.shape()[0] {
                for head in (0..grad_out.shape()[1]).filter(|head| head % inputs.gqa_group_size() != 0) {
                    grad_out.row_mut(&[row, head]).fill(0.0);
                }
            }
            result = attention::backward(&a, &inputs, &forward, &grad_out, grad_lse.as_ref());
        }
        write(&mut grads.grad_key, &result.key)?;
        write(&mut grads.grad_value, &result.value)
    }

    fn select(
        &self,
        args: &SelectArgs<'_>,
        output: &mut AttentionOutput<'_>,
        topk_indices: &mut TensorViewMut<'_>,
    ) -> Result<()> {
        NaiveBackend::default().select(args, output, topk_indices)?;
        let config = match self.fault {
            Fault::NothingForced => NsaConfig { init_blocks: 0, local_blocks: 0, ..args.config.clone() },
            Fault::TieToHigher | Fault::FlatScores => args.config.clone(),
            _ => return Ok(()),
        };
        let inputs = AttentionInputs::new(&args.attention);
        let selection = select::forward(&Rounded(DType::F32), &inputs, &config)?;
        let (heads, rows, topk) = (inputs.key.shape()[1], inputs.query.shape()[0], config.topk);
        let mut ids = Array::filled(&[heads, rows, topk], -1.0);
        for kv_head in 0..heads {
            for place in places(inputs.batch, kv_head) {
                let scores = match self.fault {
                    Fault::FlatScores => flat_scores(&inputs, &selection, &config, &place),
                    _ => selection.scores[kv_head * rows + place.row].clone(),
                };
                let chosen = choose(self.fault, &scores, &config);
                for (slot, block) in chosen.into_iter().enumerate() {
                    *ids.at_mut(&[kv_head, place.row, slot]) = block as f64;
                }
            }
        }
        write(topk_indices, &ids)
    }

    fn compress(&self, args: &CompressArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        NaiveBackend::default().compress(args, out)?;
        if self.is(Fault::ShortMean) && args.kernel_size > 1 && args.compression.name() == "mean" {
            let factor = args.kernel_size as f64 / (args.kernel_size - 1) as f64;
            write(out, &Array::from_view(&out.view()).map(|v| v * factor))?;
        }
        Ok(())
    }

    fn compress_backward(
        &self,
        args: &CompressArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CompressGrads<'_>,
    ) -> Result<()> {
        NaiveBackend::default().compress_backward(args, grad_out, grads)?;
        if self.is(Fault::NoGradInput) {
            let zeros = Array::zeros(args.input.shape());
            write(&mut grads.grad_input, &zeros)?;
        }
        Ok(())
    }

    fn rope(&self, args: &RopeArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        if !self.is(Fault::CoarseAngle) {
            return NaiveBackend::default().rope(args, out);
        }
        args.shape(out)?;
        let x = Array::from_view(&args.input);
        let half = x.shape()[2] / 2;
        let mut result = x.clone();
        for (row, position) in args.positions.iter().enumerate() {
            for (k, frequency) in args.rope.frequencies(2 * half).into_iter().enumerate() {
                let angle = f64::from(*position as f32 * frequency as f32) * if args.inverse { -1.0 } else { 1.0 };
                for head in 0..x.shape()[1] {
                    let (a, b) = (x.at(&[row, head, k]), x.at(&[row, head, k + half]));
                    *result.at_mut(&[row, head, k]) = a * angle.cos() - b * angle.sin();
                    *result.at_mut(&[row, head, k + half]) = a * angle.sin() + b * angle.cos();
                }
            }
        }
        write(out, &result)
    }

    fn combine(&self, args: &CombineArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        let [compressed, selected, window] = args.branches;
        let branches = match self.fault {
            Fault::SwappedGates => [compressed, window, selected],
            _ => args.branches,
        };
        NaiveBackend::default().combine(&CombineArgs { branches, ..*args }, out)
    }

    fn combine_backward(
        &self,
        args: &CombineArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CombineGrads<'_>,
    ) -> Result<()> {
        NaiveBackend::default().combine_backward(args, grad_out, grads)?;
        let heads = grad_out.shape()[1].max(1) as f64;
        if self.is(Fault::GateOfOneHead) && args.gates.shape().len() == 2 {
            let gates = Array::from_view(&grads.grad_gates.view()).map(|v| v / heads);
            write(&mut grads.grad_gates, &gates)?;
        }
        Ok(())
    }

    fn nsa(&self, args: &NsaArgs<'_>, out: &mut TensorViewMut<'_>, save: bool) -> Result<NsaForward> {
        let rope = if self.is(Fault::NoRope) { None } else { args.rope };
        NaiveBackend::default().nsa(&NsaArgs { rope, ..*args }, out, save)
    }

    fn nsa_backward(
        &self,
        args: &NsaArgs<'_>,
        saved: &NsaSaved,
        grad_out: &TensorView<'_>,
        grads: &mut NsaGrads<'_>,
    ) -> Result<()> {
        let mut saved = saved.clone();
        if self.is(Fault::NoRope) && args.rope.is_some() {
            saved.rotated = Some([args.query.to_tensor(), args.key.to_tensor()]);
        }
        if self.is(Fault::StaleState) {
            saved.topk_indices = Tensor::zeros("topk_indices", DType::I32, saved.topk_indices.shape())?;
        }
        let rope = if self.is(Fault::NoRope) { None } else { args.rope };
        saved.rotated = saved.rotated.filter(|_| rope.is_some());
        NaiveBackend::default().nsa_backward(&NsaArgs { rope, ..*args }, &saved, grad_out, grads)
    }

    fn workspace_bytes(&self, args: &NsaArgs<'_>) -> Result<usize> {
        NaiveBackend::default().workspace_bytes(args)
    }
}

/// Every compressed key that touches a block counts once.
fn flat_scores(
    inputs: &AttentionInputs<'_>,
    selection: &select::Selection,
    config: &NsaConfig,
    place: &Place<'_>,
) -> Vec<f64> {
    let rows = inputs.query.shape()[0];
    let offsets = inputs.batch.compressed_offsets(config.kernel_size, config.kernel_stride);
    let (first, count) = (offsets[place.number], offsets[place.number + 1] - offsets[place.number]);
    let (steps, reach) = (config.block_size / config.kernel_stride, config.kernel_size / config.kernel_stride);
    let mut scores = vec![0.0; place.position / config.block_size + 1];
    for head in score::voters(config, place.kv_head, inputs.gqa_group_size()) {
        let row = &selection.attention.rows[head * rows + place.row];
        let probabilities = score::probabilities(&Rounded(DType::F32), row, first, count);
        for (j, score) in scores.iter_mut().enumerate() {
            let touching = (j * steps).saturating_sub(reach - 1)..((j + 1) * steps).min(count);
            *score += touching.filter_map(|i| probabilities.get(i)).sum::<f64>();
        }
    }
    scores
}

fn choose(fault: Fault, scores: &[f64], config: &NsaConfig) -> Vec<usize> {
    if fault != Fault::TieToHigher {
        return select::top_k(scores, config);
    }
    // Lists the blocks mirrored, so that the lower id of the mirror image is the higher one.
    let last = scores.len() - 1;
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|i, j| (scores[*j] as f32).total_cmp(&(scores[*i] as f32)).then(j.cmp(i)));
    let forced = |block: &usize| select::is_forced(*block, last + 1, config);
    let mut chosen: Vec<usize> = order.iter().copied().filter(forced).collect();
    let slots = config.topk.min(last + 1) - chosen.len();
    chosen.extend(order.into_iter().filter(|block| !forced(block)).take(slots));
    chosen.sort_unstable();
    chosen
}

/// Every one of `stages`, with pass, in which the suite finds the fault in f32.
fn caught(fault: Fault, stages: &[Stage]) -> BTreeSet<(Stage, Pass)> {
    caught_in(DType::F32, fault, stages)
}

fn caught_in(dtype: DType, fault: Fault, stages: &[Stage]) -> BTreeSet<(Stage, Pass)> {
    let backend = Mutant { fault, calls: AtomicUsize::new(0) };
    let dtypes = vec![dtype];
    let options = CheckOptions { cases: 24, stages: stages.to_vec(), dtypes, ..CheckOptions::default() };
    let reports = run(&backend, &options, &mut |_| {});
    reports.iter().filter(|report| report.failures > 0).map(|report| (report.stage, report.pass)).collect()
}

const SMALL: [Stage; 3] = [Stage::Compress, Stage::Rope, Stage::Combine];

const ATTENTION: [Stage; 4] = [Stage::Compressed, Stage::Selected, Stage::Window, Stage::Dense];

fn both(stages: &[Stage]) -> BTreeSet<(Stage, Pass)> {
    stages.iter().flat_map(|stage| Pass::ALL.iter().map(move |pass| (*stage, *pass))).collect()
}

fn forward(stages: &[Stage]) -> BTreeSet<(Stage, Pass)> {
    stages.iter().map(|stage| (*stage, Pass::Forward)).collect()
}

fn backward(stages: &[Stage]) -> BTreeSet<(Stage, Pass)> {
    stages.iter().map(|stage| (*stage, Pass::Backward)).collect()
}

#[test]
fn wrong_edges_are_caught_in_every_attention_stage() {
    assert_eq!(caught(Fault::LateEdge, &ATTENTION), both(&ATTENTION));
    assert_eq!(caught(Fault::EarlyEdge, &ATTENTION), both(&ATTENTION));
    assert_eq!(caught(Fault::DroppedBlock, &ATTENTION), both(&[Stage::Selected]));
}

#[test]
fn wrong_softmax_is_caught_in_every_attention_stage() {
    // The backward takes the merged output: delta is wrong as well.
    assert_eq!(caught(Fault::BaseTwoMerge, &ATTENTION), both(&ATTENTION));
    assert_eq!(caught(Fault::BaseTwoLse, &ATTENTION), forward(&ATTENTION));
    assert_eq!(caught(Fault::IgnoredScale, &ATTENTION), forward(&ATTENTION));
}

#[test]
fn careless_memory_is_caught() {
    // The backward's own forward is called twice as well, and looked at for elements that were not written.
    assert_eq!(caught(Fault::UnwrittenRow, &ATTENTION), both(&ATTENTION));
    assert_eq!(caught(Fault::Unrepeatable, &ATTENTION), both(&ATTENTION));
    assert_eq!(caught(Fault::Panic, &ATTENTION), both(&ATTENTION));
    assert!(caught(Fault::NanLeak, &ATTENTION).is_superset(&forward(&ATTENTION)));
}

#[test]
fn wrong_gradients_are_caught() {
    assert_eq!(caught(Fault::OneHeadOfGroup, &ATTENTION), backward(&ATTENTION));
    assert_eq!(caught(Fault::IgnoredGradLse, &ATTENTION), backward(&ATTENTION));
    assert_eq!(caught(Fault::NoGradInput, &SMALL), backward(&[Stage::Compress]));
    assert_eq!(caught(Fault::GateOfOneHead, &SMALL), backward(&[Stage::Combine]));
    assert_eq!(caught(Fault::StaleState, &[Stage::Nsa]), backward(&[Stage::Nsa]));
}

#[test]
fn wrong_selections_are_caught() {
    for fault in [Fault::TieToHigher, Fault::FlatScores, Fault::NothingForced] {
        assert_eq!(caught(fault, &[Stage::Select]), forward(&[Stage::Select]), "{fault:?}");
    }
}

#[test]
fn wrong_small_stages_are_caught() {
    assert_eq!(caught(Fault::ShortMean, &SMALL), forward(&[Stage::Compress]));
    assert_eq!(caught(Fault::CoarseAngle, &SMALL), both(&[Stage::Rope]));
    assert_eq!(caught(Fault::SwappedGates, &SMALL), forward(&[Stage::Combine]));
    assert_eq!(caught(Fault::NoRope, &[Stage::Nsa]), both(&[Stage::Nsa]));
}

/// The tolerance of bf16 is wide, but not as wide as a fault.
#[test]
fn faults_are_caught_in_bf16_too() {
    for fault in [Fault::LateEdge, Fault::EarlyEdge, Fault::BaseTwoMerge] {
        assert_eq!(caught_in(DType::Bf16, fault, &ATTENTION), both(&ATTENTION), "{fault:?}");
    }
    assert_eq!(caught_in(DType::Bf16, Fault::DroppedBlock, &ATTENTION), both(&[Stage::Selected]));
    assert_eq!(caught_in(DType::Bf16, Fault::OneHeadOfGroup, &ATTENTION), backward(&ATTENTION));
    assert_eq!(caught_in(DType::Bf16, Fault::TieToHigher, &[Stage::Select]), forward(&[Stage::Select]));
}
