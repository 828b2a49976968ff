//! The choice of routes: against measurements, and where there is no choice.

use super::*;
use crate::arch::KernelSet;
use crate::measured::RouteTimes;
use serde::Deserialize;

/// A measured time, as `crates/fsa-cuda/dev/routes.py bench` prints it.
#[derive(Debug, Clone, Deserialize)]
struct Record {
    n: usize,
    g: usize,
    hq: usize,
    d: usize,
    bk: usize,
    #[serde(rename = "T")]
    topk: usize,
    /// Of the window whose backward is in the time.
    #[serde(default)]
    window: Option<usize>,
    pass: Pass,
    route: Route,
    ms: f64,
}

impl Record {
    fn problem(&self) -> Problem {
        Problem {
            total_q: self.n,
            total_kv: self.n,
            sequences: 1,
            num_q_heads: self.hq,
            num_kv_heads: self.hq / self.g,
            head_dim: self.d,
            block_size: self.bk,
            topk: self.topk,
            dtype: DType::Bf16,
        }
    }

    fn predicted(&self) -> f64 {
        self.prediction().of(self.route)
    }

    fn prediction(&self) -> Prediction {
        let (problem, facts) = (self.problem(), DeviceFacts::h200());
        let with_window = |size| Prediction::with_window(&problem, &facts, size, true);
        self.window.map_or_else(|| Prediction::new(&problem, self.pass, &facts), with_window)
    }

    /// Predicted over measured.
    fn error(&self) -> f64 {
        self.predicted() / self.ms
    }
}

fn records() -> Vec<Record> {
    let routes = include_str!("../../../../bench/records/h200/2026-11-21-routes.json");
    let with_window = include_str!("../../../../bench/records/h200/2026-11-22-window-routes.json");
    let list = |text| serde_json::from_str::<Vec<Record>>(text).expect("a list of times");
    [list(routes), list(with_window)].concat()
}

/// How far a prediction may be from a measurement, either way.
const ERROR: f64 = 1.25;

#[test]
fn predicted_times_are_those_that_were_measured() {
    let far: Vec<_> = records().into_iter().filter(|r| !(1.0 / ERROR..=ERROR).contains(&r.error())).collect();
    let lines: Vec<_> = far.iter().map(|r| format!("{:.2} of {r:?}", r.error())).collect();
    assert!(far.is_empty(), "{}", lines.join("\n"));
}

#[test]
fn the_faster_route_is_chosen_wherever_it_matters() {
    let all = records();
    let mut clear = 0;
    for pair in all.chunks_exact(2) {
        let [a, b] = pair else { unreachable!("chunks of two") };
        assert_eq!((a.problem(), a.pass), (b.problem(), b.pass), "two routes of one call stand side by side");
        let (faster, slower) = if a.ms < b.ms { (a, b) } else { (b, a) };
        let chosen = a.prediction().faster();
        // What a wrong choice may cost.
        if slower.ms > 1.1 * faster.ms {
            assert_eq!(chosen, faster.route, "{faster:?} {slower:?}");
            clear += 1;
        }
    }
    assert!(clear >= 40 && all.len() >= 100, "{clear} of {} times", all.len());
}

fn problem(tokens: usize, topk: usize) -> Problem {
    let (pass, route) = (Pass::Forward, Route::KvOuter);
    Record { n: tokens, g: 4, hq: 32, d: 128, bk: 64, topk, window: None, pass, route, ms: 1.0 }.problem()
}

fn with_route(route: Route) -> PlanOptions {
    PlanOptions { route: Some(route), ..PlanOptions::default() }
}

#[test]
fn short_calls_are_dense_and_long_ones_are_not() {
    let facts = DeviceFacts::h200();
    let plan = |tokens| {
        let (problem, options) = (problem(tokens, 16), PlanOptions::default());
        let forward = SelectedPlan::new(&problem, KernelSet::Sm90, &facts, &options).route();
        (forward, SelectedBackwardPlan::new(&problem, KernelSet::Sm90, &facts, &options).route())
    };
    assert_eq!(plan(1024), (Route::DenseMasked, Route::DenseMasked));
    assert_eq!(plan(65_536), (Route::KvOuter, Route::KvOuter));
}

#[test]
fn a_mask_takes_no_more_than_the_lists_and_the_budget() {
    let facts = DeviceFacts::h200();
    let options = with_route(Route::DenseMasked);
    for (tokens, topk) in [(1, 1), (2048, 1), (4096, 2), (32_768, 16), (131_072, 64)] {
        let problem = problem(tokens, topk);
        let plan = SelectedPlan::new(&problem, KernelSet::Sm90, &facts, &options);
        assert_eq!(plan.route(), Route::DenseMasked, "{plan}");
        assert!(plan.workspace().size_bytes() <= DEFAULT_BUDGET_BYTES + problem.topk_indices_bytes(), "{plan}");
    }
    // More than 32 blocks for every id of a list, or no memory at all: the other route.
    let long = SelectedPlan::new(&problem(32_769, 16), KernelSet::Sm90, &facts, &options);
    let poor = PlanOptions { budget_bytes: 0, ..options };
    let poor = SelectedBackwardPlan::new(&problem(32_768, 16), KernelSet::Sm80, &facts, &poor);
    assert_eq!((long.route(), poor.route()), (Route::KvOuter, Route::KvOuter));
}

#[test]
fn rows_that_list_all_they_see_need_no_mask() {
    let (facts, options) = (DeviceFacts::h200(), with_route(Route::DenseMasked));
    let launches = |tokens, lists| {
        let problem = problem(tokens, 16);
        let forward = SelectedPlan::with_lists(&problem, KernelSet::Sm90, &facts, &options, lists);
        let backward = match lists {
            Lists::Given => SelectedBackwardPlan::new(&problem, KernelSet::Sm90, &facts, &options),
            Lists::Selected => SelectedBackwardPlan::of_branch(&problem, (KernelSet::Sm90, &facts), &options, 512),
        };
        (forward.launches(), backward.launches())
    };
    assert_eq!(launches(1024, Lists::Selected), (2, 5));
    assert_eq!(launches(1025, Lists::Selected), (3, 6));
    assert_eq!(launches(1024, Lists::Given), (3, 6));
}

#[test]
fn selected_blocks_and_window_have_wide_tiles_where_there_is_a_mask() {
    let (facts, options) = (DeviceFacts::h200(), with_route(Route::DenseMasked));
    let tiles = |tokens| {
        let problem = problem(tokens, 16);
        let plan = DenseBackwardPlan::new(&problem, (KernelSet::Sm90, &facts), &options, Some(512)).expect("room");
        let kernel = plan.specialisation(KernelSet::Sm90);
        (plan.attention.tiles.tile_tokens, kernel.block_mask, kernel.wide_rows, kernel.exists(16))
    };
    assert_eq!(tiles(1024), (16, false, false, true));
    assert_eq!(tiles(1025), (20, true, true, true));
}

#[test]
fn a_route_is_asked_for_by_name_or_both_by_shape() {
    let parse = |text: &str| text.parse::<Routing>();
    assert_eq!(parse("kv_outer").expect("a route"), Routing::Always(Route::KvOuter));
    assert_eq!(parse("dense_masked").expect("a route"), Routing::Always(Route::DenseMasked));
    assert_eq!(parse("fastest").expect("the default"), Routing::default());
    assert_eq!(parse("dense").expect_err("no route").argument(), Some("route"));
    let both = parse("both").expect("for checks");
    let routes: Vec<_> = (100..104).map(|tokens| both.route(&problem(tokens, 16))).collect();
    assert_eq!(routes[0], routes[2]);
    assert_ne!(routes[0], routes[1]);
}

#[test]
fn an_explanation_says_what_every_way_takes() {
    let facts = DeviceFacts::h200();
    let explain = |tokens, routing, measured| {
        let explained =
            Explained::new(&problem(tokens, 16), Pass::Forward, (KernelSet::Sm90, &facts), routing, measured);
        explained.to_string()
    };
    let short = explain(1024, Routing::Fastest, None);
    assert!(short.starts_with("forward, g = 4, 1K: dense, ") && short.ends_with("x (predicted)"), "{short}");
    let times = RouteTimes { kv_outer: 0.3, dense_masked: 0.2 };
    assert_eq!(explain(4096, Routing::Fastest, Some(times)), "forward, g = 4, 4K: dense with mask, 1.5x (measured)");
    let forced = explain(4096, Routing::Always(Route::KvOuter), Some(times));
    assert_eq!(forced, "forward, g = 4, 4K: KV-outer, 0.7x (asked for)");
    assert!(explain(65_536, Routing::Always(Route::DenseMasked), None).ends_with("(the mask has no room)"));
}
