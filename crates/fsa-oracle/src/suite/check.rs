//! What every stage's check shares: calling twice, looking for unwritten and overrun memory, comparing.

use crate::arithmetic::{Arithmetic, Exact, Noisy, Rounded};
use crate::array::Array;
use crate::buffer::{Buffer, unravel};
use crate::case::{Case, Hostile};
use crate::inputs::{Stream, random};
use crate::suite::trial::Beside;
use crate::tolerance::{self, Worst};
use fsa_core::{DType, Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The result of one case.
#[derive(Debug, Clone)]
pub struct CaseOutcome {
    /// The case.
    pub case: Case,
    /// What was wrong, each with the tensor and the element.
    pub failures: Vec<String>,
    /// Largest error over its bound.
    pub worst_ratio: f64,
    /// The element with that ratio.
    pub worst: Option<Worst>,
    /// Rows whose selection rounding may decide.
    pub ambiguous_rows: usize,
    /// Rows whose selection was compared id by id.
    pub decided_rows: usize,
    /// Hash of the bits of every output: equal for equal results, to compare runs on several numbers of threads.
    pub digest: u64,
    /// What another backend made of the case, if one was asked for.
    pub beside: Option<Beside>,
}

impl CaseOutcome {
    /// True if nothing was wrong.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }
}

/// Evaluations with random errors besides the one rounded to nearest. More for small cases, in which a largest error
/// over few elements says little; and where logits are large, because there a single row, in which two errors of a
/// logit may cancel, decides the largest error of a tensor.
fn noisy_evaluations(case: &Case) -> usize {
    use Hostile::{Huge, LogitOffset, LogitOffsetNegative, Peaked};
    let large_logits = matches!(case.hostile, Huge | LogitOffset | LogitOffsetNegative | Peaked);
    let fewest = if large_logits { 8 } else { 3 };
    (4_000_000 / case.cost().max(1)).clamp(fewest, 8)
}

/// Poisoned gradient of `like`, in the dtype and layout of the case.
pub(super) fn gradient(case: &Case, name: &'static str, like: &Buffer) -> Buffer {
    Buffer::poisoned(name, case.dtype, like.shape(), case.layout)
}

/// A tensor that was compared with the oracle.
struct Judged {
    name: &'static str,
    dtype: DType,
    got: Array,
    bound: f64,
}

/// A case under way.
pub(super) struct Check<'c> {
    case: &'c Case,
    /// Calls that must give equal bits.
    calls: usize,
    judged: Vec<Judged>,
    outcome: CaseOutcome,
}

impl<'c> Check<'c> {
    pub(super) fn new(case: &'c Case, calls: usize) -> Self {
        let outcome = CaseOutcome {
            case: case.clone(),
            failures: Vec::new(),
            worst_ratio: 0.0,
            worst: None,
            ambiguous_rows: 0,
            decided_rows: 0,
            digest: 0xcbf2_9ce4_8422_2325,
            beside: None,
        };
        Self { case, calls, judged: Vec::new(), outcome }
    }

    pub(super) fn outcome(self) -> CaseOutcome {
        self.outcome
    }

    pub(super) fn fail(&mut self, message: String) {
        self.outcome.failures.push(message);
    }

    pub(super) fn count_rows(&mut self, decided: usize, ambiguous: usize) {
        self.outcome.decided_rows += decided;
        self.outcome.ambiguous_rows += ambiguous;
    }

    /// Takes over what the same backend made of the case in another way: failures and the largest error count.
    pub(super) fn add_way(&mut self, name: &str, other: Check<'_>) {
        let CaseOutcome { failures, worst_ratio, .. } = other.outcome;
        self.outcome.failures.extend(failures.into_iter().map(|failure| format!("{name}: {failure}")));
        self.outcome.worst_ratio = self.outcome.worst_ratio.max(worst_ratio);
    }

    /// Takes over what another backend made of the same case.
    pub(super) fn set_beside(&mut self, name: &str, other: Check<'_>) {
        let mut difference: Option<Worst> = None;
        for (own, other) in self.judged.iter().zip(&other.judged) {
            let worst = tolerance::worst_value(own.name, own.dtype, own.got.data(), &other.got, own.bound);
            if let Some(worst) = worst.filter(|new| difference.as_ref().is_none_or(|old| new.ratio > old.ratio)) {
                difference = Some(worst);
            }
        }
        let CaseOutcome { failures, worst_ratio, .. } = other.outcome;
        self.outcome.failures.extend(failures.into_iter().map(|failure| format!("backend {name}: {failure}")));
        self.outcome.beside = Some(Beside { worst_ratio, difference });
    }

    /// Calls the backend as often as asked for and returns the outputs of the first call.
    pub(super) fn run(&mut self, call: impl Fn() -> Result<Vec<Buffer>>) -> Result<Vec<Buffer>> {
        let first = guarded(&call)?;
        first.iter().for_each(|buffer| self.look_at_memory(buffer));
        for number in 2..=self.calls {
            let again = guarded(&call)?;
            for (a, b) in first.iter().zip(&again) {
                if !self.same_bits(&format!("call {number}"), a, b)? {
                    return Ok(first);
                }
            }
        }
        Ok(first)
    }

    /// Requires equal bits of two results of the same call; false if they are not.
    pub(super) fn same_bits(&mut self, what: &str, a: &Buffer, b: &Buffer) -> Result<bool> {
        if a.bits() == b.bits() {
            return Ok(true);
        }
        let (x, y) = (a.view()?.to_f64(), b.view()?.to_f64());
        let place = x.iter().zip(&y).position(|(x, y)| x.to_bits() != y.to_bits()).unwrap_or(0);
        let (name, index) = (a.name(), unravel(place, a.shape()));
        self.fail(format!("{name}{index:?}: {what} gave {:e} after {:e}", y[place], x[place]));
        Ok(false)
    }

    fn look_at_memory(&mut self, buffer: &Buffer) {
        for bits in buffer.bits() {
            // FNV-1a over words.
            self.outcome.digest = (self.outcome.digest ^ u64::from(bits)).wrapping_mul(0x0100_0000_01b3);
        }
        if let Some(index) = buffer.first_unwritten() {
            self.fail(format!("{}{index:?}: was not written", buffer.name()));
        }
        if let Some(offset) = buffer.first_overrun() {
            self.fail(format!("{}: element {offset} of the memory, outside of the view, was written", buffer.name()));
        }
    }

    /// Compares outputs with `evaluate`, which computes the same tensors in any arithmetic.
    pub(super) fn compare(&mut self, got: &[Buffer], evaluate: impl Fn(&dyn Arithmetic) -> Vec<Array>) -> Result<()> {
        self.try_compare(got, |a| Ok(evaluate(a)))
    }

    /// [`Check::compare`] where the evaluation may fail.
    pub(super) fn try_compare(
        &mut self,
        got: &[Buffer],
        evaluate: impl Fn(&dyn Arithmetic) -> Result<Vec<Array>>,
    ) -> Result<()> {
        let exact = evaluate(&Exact)?;
        let mut naive = vec![evaluate(&Rounded(self.case.dtype))?];
        let mut seeds = random(self.case, Stream::Noise);
        for _ in 0..noisy_evaluations(self.case) {
            naive.push(evaluate(&Noisy::new(self.case.dtype, seeds.next_u64()))?);
        }
        for (number, (buffer, exact)) in got.iter().zip(&exact).enumerate() {
            let view = buffer.view()?;
            if view.shape() != exact.shape() {
                return Err(Error::input(buffer.name(), format!("{:?}", exact.shape()), format!("{:?}", view.shape())));
            }
            let bound = tolerance::bound(view.dtype(), exact, naive.iter().map(|tensors| &tensors[number]));
            if let Some(worst) = tolerance::worst(buffer.name(), &view, exact, bound) {
                self.judge(worst);
            }
            let got = Array::from_view(&view);
            self.judged.push(Judged { name: buffer.name(), dtype: view.dtype(), got, bound });
        }
        Ok(())
    }

    fn judge(&mut self, worst: Worst) {
        if worst.ratio > 1.0 {
            self.fail(worst.to_string());
        }
        if self.outcome.worst.as_ref().is_none_or(|old| worst.ratio > old.ratio) {
            self.outcome.worst_ratio = worst.ratio;
            self.outcome.worst = Some(worst);
        }
    }
}

/// A panic of the backend is the failure of a case, not the end of the suite.
fn guarded<T>(call: &impl Fn() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Error::Backend { backend: "tested".into(), message: format!("panicked: {text}") })
    })
}
