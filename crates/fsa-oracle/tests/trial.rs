//! How a backend is tried: more than two calls, in any order, and beside another one.

use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Backend, CombineArgs,
    CombineGrads, CompressArgs, CompressGrads, DType, NsaArgs, NsaForward, NsaGrads, NsaSaved, Result, RopeArgs,
    SelectArgs, Stage, TensorView, TensorViewMut,
};
use fsa_oracle::naive::NaiveBackend;
use fsa_oracle::suite::{CheckOptions, Trial, run};
use fsa_oracle::{Case, Pass};
use std::sync::atomic::{AtomicUsize, Ordering};

const LINE: &str = "window:forward:f32:seed=5:q=40:kv=40:hq=2:hkv=1:d=16:window=8";

/// Right, but for the result of one call: `faulty` of all calls of either pass.
#[derive(Default)]
struct Faulty {
    faulty: usize,
    calls: AtomicUsize,
}

impl Faulty {
    fn scale(&self, args: &AttentionArgs<'_>) -> Option<f32> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        Some(if call == self.faulty { 2.0 * args.scale() } else { args.scale() })
    }
}

impl Backend for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn attention(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        out: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        let args = AttentionArgs { softmax_scale: self.scale(args), ..*args };
        NaiveBackend::default().attention(stage, &args, out)
    }

    fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        let args = AttentionArgs { softmax_scale: self.scale(args), ..*args };
        NaiveBackend::default().attention_backward(stage, &args, grad, grads)
    }

    fn select(&self, _: &SelectArgs<'_>, _: &mut AttentionOutput<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        unreachable!("not tried")
    }

    fn compress(&self, _: &CompressArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        unreachable!("not tried")
    }

    fn compress_backward(&self, _: &CompressArgs<'_>, _: &TensorView<'_>, _: &mut CompressGrads<'_>) -> Result<()> {
        unreachable!("not tried")
    }

    fn rope(&self, _: &RopeArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        unreachable!("not tried")
    }

    fn combine(&self, _: &CombineArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        unreachable!("not tried")
    }

    fn combine_backward(&self, _: &CombineArgs<'_>, _: &TensorView<'_>, _: &mut CombineGrads<'_>) -> Result<()> {
        unreachable!("not tried")
    }

    fn nsa(&self, _: &NsaArgs<'_>, _: &mut TensorViewMut<'_>, _: bool) -> Result<NsaForward> {
        unreachable!("not tried")
    }

    fn nsa_backward(&self, _: &NsaArgs<'_>, _: &NsaSaved, _: &TensorView<'_>, _: &mut NsaGrads<'_>) -> Result<()> {
        unreachable!("not tried")
    }

    fn workspace_bytes(&self, _: &NsaArgs<'_>) -> Result<usize> {
        unreachable!("not tried")
    }
}

fn case() -> Case {
    LINE.parse().expect("valid")
}

#[test]
fn the_seventh_call_is_seen_by_whoever_asks_for_as_many() {
    let faulty = || Faulty { faulty: 7, ..Faulty::default() };
    for calls in [2, 6] {
        let backend = faulty();
        let outcome = Trial::new(&backend).calls(calls).run_case(&case());
        assert!(outcome.passed(), "{:?}", outcome.failures);
        assert_eq!(backend.calls.load(Ordering::SeqCst), calls);
    }
    let outcome = Trial::new(&faulty()).calls(20).run_case(&case());
    assert!(outcome.failures.iter().all(|failure| failure.contains("call 7 gave")), "{:?}", outcome.failures);
    assert!(!outcome.passed());
}

#[test]
fn two_right_backends_differ_by_less_than_two_bounds() {
    let (one, other) = (NaiveBackend::default(), NaiveBackend::reordered());
    let options = CheckOptions {
        cases: 6,
        stages: vec![Stage::Selected, Stage::Combine],
        dtypes: vec![DType::F32],
        passes: Pass::ALL.to_vec(),
        ..CheckOptions::default()
    };
    let alone = run(&one, &options, &mut |_| {});
    let together = Trial::new(&one).beside(&other).run(&options, &mut |_| {});
    let mut differs = false;
    for (alone, report) in alone.iter().zip(&together) {
        assert_eq!((alone.worst_ratio, report.failures), (report.worst_ratio, 0), "{report:#?}");
        let beside = report.beside.as_ref().expect("asked for");
        assert!(beside.worst_ratio <= 1.0 && beside.greatest_difference <= 2.0, "{beside:#?}");
        assert_eq!(beside.difference.is_some(), beside.greatest_difference > 0.0);
        differs |= beside.greatest_difference > 0.0;
    }
    assert!(differs, "sums in another order round differently");
    assert!(alone.iter().all(|report| report.beside.is_none()));
}

#[test]
fn a_wrong_backend_beside_a_right_one_is_a_failure_under_its_name() {
    // Its first result, the one that is compared, is wrong, and its second differs.
    let (right, wrong) = (NaiveBackend::default(), Faulty { faulty: 1, ..Faulty::default() });
    let outcome = Trial::new(&right).beside(&wrong).run_case(&case());
    assert!(!outcome.passed());
    assert!(outcome.failures.iter().all(|failure| failure.starts_with("backend faulty: ")), "{:?}", outcome.failures);
    let beside = outcome.beside.expect("asked for");
    assert!(beside.worst_ratio > 1.0 && outcome.worst_ratio <= 1.0);
    assert!(beside.difference.is_some_and(|difference| difference.ratio > 1.0));
}

#[test]
fn a_backward_in_any_order_is_called_once_and_must_be_right() {
    let repeatable = NaiveBackend::default();
    let backward: Case = LINE.replace("forward", "backward").parse().expect("a case");
    // A forward, whose results the backward starts from, and the backward.
    for (faulty, passes) in [(0, true), (2, false)] {
        let unordered = Faulty { faulty, ..Faulty::default() };
        let outcome = Trial::new(&repeatable).unordered(&unordered).run_case(&backward);
        assert_eq!((unordered.calls.load(Ordering::SeqCst), outcome.passed()), (2, passes), "{:?}", outcome.failures);
        assert_eq!(outcome.worst_ratio <= 1.0, passes);
        assert!(outcome.failures.iter().all(|failure| failure.starts_with("in any order: ")), "{:?}", outcome.failures);
    }
    let unordered = Faulty { faulty: 1, ..Faulty::default() };
    assert!(Trial::new(&repeatable).unordered(&unordered).run_case(&case()).passed());
    assert_eq!(unordered.calls.load(Ordering::SeqCst), 0, "forwards have one order");
}
