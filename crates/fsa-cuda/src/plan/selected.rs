//! The plans of stage `selected` by either route.

use super::route::{self, Pass, Prediction, Route};
use super::{
    BackwardPlan, BandBackwardPlan, DenseBackwardPlan, DensePlan, ForwardPlan, Lists, PlanOptions, Problem, QuerySums,
    Workspace,
};
use crate::arch::KernelSet;
use crate::driver::DeviceFacts;
use crate::source::Specialisation;
use serde::Serialize;
use std::fmt;

/// Chunks, or tiles, and workspace of a forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectedPlan {
    /// Block by block, over the inverse index.
    KvOuter(ForwardPlan),
    /// All earlier keys, with a mask.
    DenseMasked(DensePlan),
}

impl SelectedPlan {
    /// Plans a checked problem for the kernels of `set`: by the route of the options, else by the one that is predicted to be
    /// faster. Where the dense route has no room, there is one route.
    pub fn new(problem: &Problem, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions) -> Self {
        Self::with_lists(problem, set, facts, options, Lists::Given)
    }

    /// The same where it is known where the lists come from.
    pub(crate) fn with_lists(
        problem: &Problem,
        set: KernelSet,
        facts: &DeviceFacts,
        options: &PlanOptions,
        lists: Lists,
    ) -> Self {
        let chosen = options.route.unwrap_or_else(|| route::faster(problem, facts, lists));
        let dense = (chosen == Route::DenseMasked).then(|| DensePlan::new(problem, set, options, lists)).flatten();
        dense.map_or_else(|| Self::KvOuter(ForwardPlan::new(problem, set, facts, options)), Self::DenseMasked)
    }

    /// Which it is.
    pub fn route(&self) -> Route {
        match self {
            Self::KvOuter(_) => Route::KvOuter,
            Self::DenseMasked(_) => Route::DenseMasked,
        }
    }

    /// Whether it is attention to all keys that a row sees, because rows list all blocks.
    pub(crate) fn is_unmasked(&self) -> bool {
        matches!(self, Self::DenseMasked(plan) if plan.mask.is_none())
    }

    /// The plan of attention to all keys with a mask, if it is that.
    pub(crate) fn masked(&self) -> Option<&DensePlan> {
        match self {
            Self::DenseMasked(plan) if plan.mask.is_some() => Some(plan),
            _ => None,
        }
    }

    /// The kernels that it launches.
    pub(crate) fn kernels(&self, set: KernelSet) -> Vec<Specialisation> {
        match self {
            Self::KvOuter(plan) => plan.problem.forward_kernels(set).to_vec(),
            Self::DenseMasked(plan) => plan.kernels(set),
        }
    }

    /// Scratch memory.
    pub fn workspace(&self) -> &Workspace {
        match self {
            Self::KvOuter(plan) => &plan.workspace,
            Self::DenseMasked(plan) => &plan.workspace,
        }
    }

    /// Kernels that a call launches.
    pub fn launches(&self) -> usize {
        match self {
            Self::KvOuter(plan) => plan.launches(),
            Self::DenseMasked(plan) => plan.launches(),
        }
    }
}

impl fmt::Display for SelectedPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KvOuter(plan) => plan.fmt(f),
            Self::DenseMasked(plan) => plan.fmt(f),
        }
    }
}

/// Chunks, or tiles, and workspace of a backward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectedBackwardPlan {
    /// Block by block, over the inverse index.
    KvOuter(BackwardPlan),
    /// All earlier keys, with a mask.
    DenseMasked(DenseBackwardPlan),
}

impl SelectedBackwardPlan {
    /// Plans a checked problem for the kernels of `set`; see [`SelectedPlan::new`].
    pub fn new(problem: &Problem, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions) -> Self {
        let predicted = || Prediction::new(problem, Pass::Backward, facts).faster();
        let is_dense = options.route.unwrap_or_else(predicted) == Route::DenseMasked;
        let dense = is_dense.then(|| DenseBackwardPlan::new(problem, (set, facts), options, None)).flatten();
        dense.map_or_else(|| Self::KvOuter(BackwardPlan::new(problem, set, facts, options)), Self::DenseMasked)
    }

    /// The same as a branch of the whole, whose window is as long: lists of stage `select`, statistics of rows that the caller has,
    /// and the window in the same pass, where that is possible.
    pub(crate) fn of_branch(
        problem: &Problem,
        (set, facts): (KernelSet, &DeviceFacts),
        options: &PlanOptions,
        window_size: usize,
    ) -> Self {
        let dense = DenseBackwardPlan::new(problem, (set, facts), options, Some(window_size)).filter(|dense| {
            let one_pass = dense.window_size.is_some();
            let predicted = || Prediction::with_window(problem, facts, window_size, one_pass).faster();
            options.route.unwrap_or_else(predicted) == Route::DenseMasked
        });
        let options = PlanOptions { adds_to_grads: true, ..*options };
        dense.map_or_else(|| Self::KvOuter(BackwardPlan::new(problem, set, facts, &options)), Self::DenseMasked)
    }

    /// Earlier keys of the window, if it is done in the same pass.
    pub(crate) fn window_size(&self) -> Option<usize> {
        match self {
            Self::KvOuter(_) => None,
            Self::DenseMasked(plan) => plan.window_size,
        }
    }

    /// As a branch of the whole: whether gradients of queries may come as a scaled sum of the other branches, to which it adds its own, or
    /// of which and its own it makes the gradient.
    pub(crate) fn takes_sums(&self) -> bool {
        match self {
            Self::KvOuter(plan) => plan.query_sums == QuerySums::Scaled,
            Self::DenseMasked(plan) => plan.window_size.is_some(),
        }
    }

    /// The attention that the dense route goes through.
    pub(crate) fn attention(&self) -> Option<&BandBackwardPlan> {
        match self {
            Self::KvOuter(_) => None,
            Self::DenseMasked(plan) => Some(&plan.attention),
        }
    }

    /// Which it is.
    pub fn route(&self) -> Route {
        match self {
            Self::KvOuter(_) => Route::KvOuter,
            Self::DenseMasked(_) => Route::DenseMasked,
        }
    }

    /// The plan of the KV-outer route, if it is that.
    pub fn kv_outer(&self) -> Option<&BackwardPlan> {
        match self {
            Self::KvOuter(plan) => Some(plan),
            Self::DenseMasked(_) => None,
        }
    }

    /// Ranges of keys that take turns.
    pub(crate) fn key_ranges(&self) -> usize {
        self.kv_outer().map_or(1, |plan| plan.key_ranges().count())
    }

    /// The kernels that it launches.
    pub(crate) fn kernels(&self, set: KernelSet) -> Vec<Specialisation> {
        match self {
            Self::KvOuter(plan) => plan.kernels(set).to_vec(),
            Self::DenseMasked(plan) => plan.kernels(set),
        }
    }

    /// Scratch memory.
    pub fn workspace(&self) -> &Workspace {
        match self {
            Self::KvOuter(plan) => &plan.workspace,
            Self::DenseMasked(plan) => &plan.workspace,
        }
    }

    /// Kernels and fills that a call gives to the device.
    pub fn launches(&self) -> usize {
        match self {
            Self::KvOuter(plan) => plan.launches(),
            Self::DenseMasked(plan) => plan.launches(),
        }
    }
}

impl fmt::Display for SelectedBackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KvOuter(plan) => plan.fmt(f),
            Self::DenseMasked(plan) => plan.fmt(f),
        }
    }
}
