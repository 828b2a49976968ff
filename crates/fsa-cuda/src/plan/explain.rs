//! What is said about the route of a pass: which, why, and what the others would take.

use super::{
    DenseBackwardPlan, Lists, Pass, PlanOptions, Prediction, Problem, Route, Routing, SelectedBackwardPlan,
    SelectedPlan,
};
use crate::arch::KernelSet;
use crate::driver::DeviceFacts;
use crate::measured::RouteTimes;
use fsa_core::NsaConfig;
use serde::Serialize;
use std::fmt;

/// Why a route was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteReason {
    /// The environment asks for it.
    Asked,
    /// It was measured to be faster.
    Measured,
    /// It is predicted to be faster.
    Predicted,
    /// The other has no room.
    OnlyOne,
}

/// The route of a pass of stage `selected` inside the whole operation; in the backward together with the usual window.
#[derive(Debug, Clone, Serialize)]
pub struct Explained {
    /// The pass.
    pub pass: Pass,
    /// Its route.
    pub route: Route,
    /// Why.
    pub reason: RouteReason,
    /// The dense route needs a mask: a row may see more blocks than it lists.
    pub masked: bool,
    /// Predicted milliseconds of every way.
    pub predicted: Prediction,
    /// Measured milliseconds of those that are built, if this machine has them.
    pub measured: Option<RouteTimes>,
    /// Query heads that share a kv head, and tokens of a sequence.
    shape: (usize, usize),
}

impl Explained {
    /// Explains the plan of a checked problem.
    pub fn new(
        problem: &Problem,
        pass: Pass,
        (set, facts): (KernelSet, &DeviceFacts),
        routing: Routing,
        measured: Option<RouteTimes>,
    ) -> Self {
        let asked = routing.route(problem);
        let (options, window_size) = (PlanOptions::default(), NsaConfig::default().window_size);
        let takes_window = DenseBackwardPlan::takes_window(problem, set, &options);
        let predicted = match pass {
            Pass::Forward => Prediction::of_branch(problem, pass, facts),
            Pass::Backward => Prediction::with_window(problem, facts, window_size, takes_window),
        };
        // Measurements are of the stage without the window.
        let measured = measured.filter(|_| pass == Pass::Forward || !takes_window);
        let wanted = asked.or(measured.map(|times| times.faster())).unwrap_or(predicted.faster());
        let options = PlanOptions { route: Some(wanted), ..options };
        let route = match pass {
            Pass::Forward => SelectedPlan::with_lists(problem, set, facts, &options, Lists::Selected).route(),
            Pass::Backward => SelectedBackwardPlan::of_branch(problem, (set, facts), &options, window_size).route(),
        };
        let reason = match (asked, measured) {
            _ if route != wanted => RouteReason::OnlyOne,
            (Some(_), _) => RouteReason::Asked,
            (None, Some(_)) => RouteReason::Measured,
            (None, None) => RouteReason::Predicted,
        };
        let shape = (problem.gqa_group_size(), problem.total_kv.div_ceil(problem.sequences.max(1)));
        let masked = !Lists::Selected.are_complete(problem);
        Self { pass, route, reason, masked, predicted, measured, shape }
    }

    /// Milliseconds of a route: measured, else predicted.
    pub fn ms(&self, route: Route) -> f64 {
        self.measured.map_or(self.predicted.of(route), |times| times.of(route))
    }

    /// Name of a route here.
    pub fn name(&self, route: Route) -> &'static str {
        match route {
            Route::KvOuter => "KV-outer",
            Route::DenseMasked if self.masked => "dense with mask",
            Route::DenseMasked => "dense",
        }
    }
}

/// Such as `forward, g = 4, 2K: dense with mask, 1.5x (predicted)`.
impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (group, tokens) = self.shape;
        let length = if tokens >= 1024 { format!("{}K", (tokens + 512) / 1024) } else { tokens.to_string() };
        let other = if self.route == Route::KvOuter { Route::DenseMasked } else { Route::KvOuter };
        let (pass, reason) = match (self.pass, self.reason) {
            (pass, RouteReason::Asked) => (pass, "asked for"),
            (pass, RouteReason::Measured) => (pass, "measured"),
            (pass, RouteReason::Predicted) => (pass, "predicted"),
            (pass, RouteReason::OnlyOne) => (pass, "the mask has no room"),
        };
        let pass = if pass == Pass::Forward { "forward" } else { "backward" };
        let gain = self.ms(other) / self.ms(self.route);
        write!(f, "{pass}, g = {group}, {length}: {}, {gain:.1}x ({reason})", self.name(self.route))
    }
}
