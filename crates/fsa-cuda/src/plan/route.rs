//! Which way stage `selected` goes: a choice from shapes and facts about the device, by predicted times.
//!
//! Three ways are known. KV-outer gathers the rows that list a block and merges what they found there: its time grows with the
//! pairs of row and listed block, and its launches and small units cost the same at any length. Dense with a mask goes through
//! all earlier keys with the kernels of stage `dense`: it grows with the square of the length and starts at once. Query-outer, a
//! tile of keys per row, is not built: every row of a kv head would read its blocks on its own.

use super::{Lists, Problem, Sizes};
use crate::driver::DeviceFacts;
use fsa_core::Error;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A pass of the stage; each has a route of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pass {
    /// Attention.
    Forward,
    /// Its gradients.
    Backward,
}

/// A way to do stage `selected`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// Block by block: the rows that list it, found by the inverse index.
    KvOuter,
    /// Tile of rows by tile of rows: all earlier keys, with a mask of the blocks that a row lists.
    DenseMasked,
}

impl Route {
    /// Every route.
    pub const ALL: [Self; 2] = [Self::KvOuter, Self::DenseMasked];

    /// Its name, as the environment and files have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::KvOuter => "kv_outer",
            Self::DenseMasked => "dense_masked",
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::KvOuter => "KV-outer",
            Self::DenseMasked => "dense with mask",
        })
    }
}

/// Who chooses the route of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Routing {
    /// What was measured on the device, else what is predicted.
    #[default]
    Fastest,
    /// Always this one, where it has room.
    Always(Route),
    /// One or the other by the sizes of a call, so that checks meet both; so with the ways to make lists.
    Both,
}

impl Routing {
    /// The route that it asks for.
    pub(crate) fn route(self, problem: &Problem) -> Option<Route> {
        match self {
            Self::Fastest => None,
            Self::Always(route) => Some(route),
            Self::Both => Some(Route::ALL[(problem.total_q + problem.num_q_heads + problem.topk) % Route::ALL.len()]),
        }
    }

    /// Whether checks ask for lists and compressed attention in one pass, or for none where nothing is to be chosen.
    pub(crate) fn one_pass(self, sizes: &Sizes) -> Option<bool> {
        let asked = [None, Some(false), Some(true)];
        if self == Self::Both { asked[(sizes.total_q + sizes.total_kv / 2) % asked.len()] } else { None }
    }
}

impl FromStr for Routing {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let route = Route::ALL.into_iter().find(|route| route.name() == text);
        match text {
            "fastest" => Ok(Self::Fastest),
            "both" => Ok(Self::Both),
            _ => route
                .map(Self::Always)
                .ok_or_else(|| Error::input("route", "fastest, both, kv_outer or dense_masked", format!("{text:?}"))),
        }
    }
}

/// Rates of one pass of the kernels on the H200 with its 132 multiprocessors; other devices are taken to be proportional. Fitted to
/// `bench/records/h200/2026-11-21-routes.json` and, of KV-outer's backward, to what `2026-11-22-window-routes.json` held first. What is said to be of vectors grows with head_dim and is that of 128.
struct Rates {
    /// KV-outer, microseconds: launches, and units that do not fill the device.
    start: f64,
    /// Nanoseconds of a query row and a listed block: what is gathered, merged or added up in memory, of vectors.
    row: f64,
    /// The same per key of the block: products of vectors, and softmax.
    key: f64,
    softmax: f64,
    /// Of a row of a kv head and a block that it lists: the inverse index.
    index: f64,
    /// Dense, microseconds: launches, and the mask but for its rows.
    dense_start: f64,
    /// Of 128 rows and 128 keys on a multiprocessor: products of vectors, and softmax.
    step: f64,
    step_softmax: f64,
    /// What the mask adds to a step, and to the start.
    step_mask: f64,
    mask_start: f64,
    /// Nanoseconds of a row of a kv head and 32 blocks: making the mask.
    mask_word: f64,
    /// Part of the steps that are left out where no row of a tile lists their blocks.
    skips: f64,
}

const FORWARD: Rates = Rates {
    start: 29.3,
    row: 0.0687,
    key: 0.000_675,
    softmax: 0.000_594,
    index: 0.0146,
    dense_start: 8.5,
    step: 0.708,
    step_softmax: 1.104,
    step_mask: 0.13,
    mask_start: 6.6,
    mask_word: 0.066,
    skips: 1.0,
};

const BACKWARD: Rates = Rates {
    start: 65.7,
    row: 0.006_3,
    key: 0.004_36,
    softmax: 0.0,
    index: 0.059,
    dense_start: 28.5,
    step: 4.7,
    step_softmax: 0.36,
    step_mask: 1.35,
    mask_start: 6.6,
    mask_word: 0.0,
    // The pass of keys leaves out none.
    skips: 0.5,
};

/// Rates of the window in the backward of the whole, fitted to `bench/records/h200/2026-11-22-window-routes.json` with those of KV-outer
/// as they are.
struct WindowRates {
    /// By itself, microseconds: launches; nanoseconds of a query row, and of a key that it sees.
    start: f64,
    row: f64,
    key: f64,
    /// Dense and window in one pass, microseconds: launches; of a step, of its mask, of its softmax for the window.
    dense_start: f64,
    step: f64,
    step_mask: f64,
    step_window: f64,
}

const WINDOW: WindowRates = WindowRates {
    start: 14.2,
    row: 0.634,
    key: 0.001_91,
    dense_start: 34.0,
    step: 4.09,
    step_mask: 0.31,
    step_window: 0.2,
};

/// Bytes per second from L2 to the multiprocessors of the device that the rates are of, as bulk copies reach them.
const L2_BYTES_PER_SECOND: f64 = 8.7e12;
/// Multiprocessors of that device.
const MULTIPROCESSORS: f64 = 132.0;
/// Rows of a tile and keys of a step that the rates are of.
const TILE: usize = 128;

/// Predicted times of a pass, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// Block by block.
    pub kv_outer: f64,
    /// All earlier keys, with a mask.
    pub dense_masked: f64,
    /// All earlier keys: dense attention, as a yardstick.
    pub dense: f64,
    /// Every row reads its blocks: at least what that takes from L2. Not built.
    pub query_outer: f64,
}

impl Prediction {
    /// Predicts the times of a call, whose sequences are taken to be equally long.
    pub fn new(problem: &Problem, pass: Pass, facts: &DeviceFacts) -> Self {
        Self::with_lists(problem, pass, facts, Lists::Given)
    }

    /// The same as a branch of the whole, where short calls need no mask.
    pub fn of_branch(problem: &Problem, pass: Pass, facts: &DeviceFacts) -> Self {
        Self::with_lists(problem, pass, facts, Lists::Selected)
    }

    /// Of the backward as a branch of the whole, with that of the window: behind it, or in one pass with the dense route.
    pub fn with_window(problem: &Problem, facts: &DeviceFacts, window_size: usize, one_pass: bool) -> Self {
        let alone = Self::of_branch(problem, Pass::Backward, facts);
        let (work, vectors) = (Work::of(problem), problem.head_dim as f64 / 128.0);
        let [rows, seen, of_all] = Work::window(problem, window_size);
        let ms = |start: f64, us: f64| (start + us * MULTIPROCESSORS / facts.multiprocessors.max(1) as f64) * 1e-3;
        let window = ms(WINDOW.start, vectors * (rows * WINDOW.row + seen * WINDOW.key) * 1e-3);
        let mask = if Lists::Selected.are_complete(problem) { 0.0 } else { WINDOW.step_mask };
        let step = WINDOW.step + mask + WINDOW.step_window * of_all;
        let both = ms(WINDOW.dense_start, vectors * work.steps * step);
        let dense_masked = if one_pass { both } else { alone.dense_masked + window };
        Self { kv_outer: alone.kv_outer + window, dense_masked, ..alone }
    }

    pub(super) fn with_lists(problem: &Problem, pass: Pass, facts: &DeviceFacts, lists: Lists) -> Self {
        let rates = match pass {
            Pass::Forward => &FORWARD,
            Pass::Backward => &BACKWARD,
        };
        let (work, keys) = (Work::of(problem), problem.block_size as f64);
        let vectors = problem.head_dim as f64 / 128.0;
        let device = MULTIPROCESSORS / facts.multiprocessors.max(1) as f64;
        let ms = |start: f64, us: f64| (start + us * device) * 1e-3;
        let of_row = vectors * (rates.row + rates.key * keys) + rates.softmax * keys;
        let gathered = (work.listed * of_row + work.listed_by_group * rates.index) * 1e-3;
        let step = vectors * rates.step + rates.step_softmax;
        let unmasked = ms(rates.dense_start, work.steps * step);
        let met = 1.0 - rates.skips * work.unlisted_steps;
        let masked = work.steps * met * (step + rates.step_mask) + work.mask_words * rates.mask_word * 1e-3;
        let masked = ms(rates.dense_start + rates.mask_start, masked);
        // Keys and values of a block, for every row of a kv head; the backward reads them twice.
        let bytes = work.listed_by_group * keys * (4 * problem.head_dim) as f64;
        let times = if pass == Pass::Forward { 1.0 } else { 2.0 };
        Self {
            kv_outer: ms(rates.start, gathered),
            dense_masked: if lists.are_complete(problem) { unmasked } else { masked },
            dense: unmasked,
            query_outer: ms(0.0, times * bytes / L2_BYTES_PER_SECOND * 1e6),
        }
    }

    /// Of a route.
    pub fn of(&self, route: Route) -> f64 {
        match route {
            Route::KvOuter => self.kv_outer,
            Route::DenseMasked => self.dense_masked,
        }
    }

    /// The route with the least time.
    pub fn faster(&self) -> Route {
        if self.dense_masked < self.kv_outer { Route::DenseMasked } else { Route::KvOuter }
    }
}

/// The route of a forward that is predicted to be faster.
pub(super) fn faster(problem: &Problem, facts: &DeviceFacts, lists: Lists) -> Route {
    Prediction::with_lists(problem, Pass::Forward, facts, lists).faster()
}

/// What there is to do.
struct Work {
    /// Pairs of a row of a query head and a block that it lists, and of a row of a kv head.
    listed: f64,
    listed_by_group: f64,
    /// Steps of 128 keys that the multiprocessor with the most work has.
    steps: f64,
    /// Part of them that no row of a tile lists, if rows list blocks by chance.
    unlisted_steps: f64,
    /// Words of the mask.
    mask_words: f64,
}

impl Work {
    fn of(problem: &Problem) -> Self {
        let Problem { block_size, topk, num_q_heads, num_kv_heads, .. } = *problem;
        let sequences = problem.sequences.max(1);
        let (q, kv) = (problem.total_q.div_ceil(sequences), problem.total_kv.div_ceil(sequences));
        let first = kv.saturating_sub(q);
        let listed = blocks_before(kv, block_size, topk) - blocks_before(first, block_size, topk);
        let seen = blocks_before(kv, block_size, usize::MAX) - blocks_before(first, block_size, usize::MAX);
        let group = problem.gqa_group_size().max(1);
        let tile_tokens = (TILE / group).max(1);
        let tiles = (q.div_ceil(tile_tokens) * group.div_ceil(TILE) * sequences * num_kv_heads) as f64;
        // Of a tile in the middle, whose last step is half seen; a multiprocessor has tiles of all lengths, and an end of its own.
        let of_tile = (first as f64 + (q + tile_tokens) as f64 / 2.0) / TILE as f64 + 0.5;
        let tail = kv as f64 / (2 * TILE) as f64;
        let chances = (tile_tokens * (TILE / block_size).max(1)) as f64;
        Self {
            listed: listed * (sequences * num_q_heads) as f64,
            listed_by_group: listed * (sequences * num_kv_heads) as f64,
            steps: tiles * of_tile / MULTIPROCESSORS + tail,
            unlisted_steps: if seen > 0.0 { (1.0 - listed / seen).powf(chances) } else { 0.0 },
            mask_words: (sequences * num_kv_heads * q * kv.div_ceil(32 * block_size)) as f64,
        }
    }

    /// Query rows, pairs of one and a key of its window, and the part of all pairs that these are.
    fn window(problem: &Problem, window_size: usize) -> [f64; 3] {
        let sequences = problem.sequences.max(1);
        let (q, kv) = (problem.total_q.div_ceil(sequences), problem.total_kv.div_ceil(sequences));
        let pairs = |most| keys_before(kv, most) - keys_before(kv.saturating_sub(q), most);
        let (seen, all) = (pairs(window_size.saturating_add(1)), pairs(usize::MAX));
        let heads = (sequences * problem.num_q_heads) as f64;
        [q as f64 * heads, seen * heads, if all > 0.0 { seen / all } else { 0.0 }]
    }
}

/// Keys that the rows before a position see of the last `most`.
fn keys_before(position: usize, most: usize) -> f64 {
    let full = position.min(most) as f64;
    full * (full + 1.0) / 2.0 + (position as f64 - full) * most as f64
}

/// Blocks that the rows before a position list in all: each as many as it sees, up to `topk`.
fn blocks_before(position: usize, block_size: usize, topk: usize) -> f64 {
    let full = position.min(topk.saturating_mul(block_size));
    let (blocks, rest) = ((full / block_size) as f64, (full % block_size) as f64);
    let short = block_size as f64 * blocks * (blocks + 1.0) / 2.0 + rest * (blocks + 1.0);
    short + (position - full) as f64 * topk.min(position) as f64
}
