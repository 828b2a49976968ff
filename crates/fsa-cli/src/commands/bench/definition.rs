//! What is measured, as data: `bench/definitions/*.json`, compiled in.

use crate::failure::{Failure, Outcome};
use fsa::{DType, NsaConfig, Stage};
use fsa_oracle::Pass;
use serde::{Deserialize, Serialize};

/// The definitions that come with the command.
const BUILT_IN: [&str; 7] = [
    include_str!("../../../../../bench/definitions/acceptance.json"),
    include_str!("../../../../../bench/definitions/quick.json"),
    include_str!("../../../../../bench/definitions/stages.json"),
    include_str!("../../../../../bench/definitions/shapes.json"),
    include_str!("../../../../../bench/definitions/scaling.json"),
    include_str!("../../../../../bench/definitions/cuda.json"),
    include_str!("../../../../../bench/definitions/cuda_stages.json"),
];

/// Stages that can be measured.
pub const STAGES: [Stage; 9] = fsa_oracle::suite::STAGES;

/// A named list of measurements.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suite {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: String,
    groups: Vec<Group>,
}

/// The product of its lists.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    name: String,
    stages: Vec<Stage>,
    tokens: Vec<usize>,
    #[serde(default = "forward")]
    passes: Vec<Pass>,
    #[serde(default = "f32s")]
    dtypes: Vec<DType>,
    #[serde(default = "heads")]
    heads: Vec<[usize; 2]>,
    #[serde(default = "head_dims")]
    head_dims: Vec<usize>,
    #[serde(default = "configs")]
    configs: Vec<NsaConfig>,
}

fn forward() -> Vec<Pass> {
    vec![Pass::Forward]
}

fn f32s() -> Vec<DType> {
    vec![DType::F32]
}

fn heads() -> Vec<[usize; 2]> {
    vec![[8, 2]]
}

fn head_dims() -> Vec<usize> {
    vec![64]
}

fn configs() -> Vec<NsaConfig> {
    vec![NsaConfig::default()]
}

/// One measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// Suite and group that ask for it.
    pub definition: String,
    /// What runs.
    pub stage: Stage,
    /// In which direction.
    pub pass: Pass,
    /// On which type.
    pub dtype: DType,
    /// Length of the sequence.
    pub tokens: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a vector.
    pub head_dim: usize,
    /// Parameters.
    pub config: NsaConfig,
}

impl Point {
    /// One word that says everything, for `--filter` and for people.
    pub fn name(&self) -> String {
        let Self { stage, pass, dtype, tokens, num_q_heads, num_kv_heads, head_dim, config, .. } = self;
        let (block, topk) = (config.block_size, config.topk);
        format!("{stage}/{pass}/{dtype}/h{num_q_heads}-{num_kv_heads}/d{head_dim}/b{block}-{topk}/n{tokens}")
    }

    /// True if `other` differs only in the stage and in parameters of sparse attention.
    pub fn same_tensors(&self, other: &Point) -> bool {
        let key = |p: &Point| (p.pass, p.dtype, p.tokens, p.num_q_heads, p.num_kv_heads, p.head_dim);
        key(self) == key(other)
    }
}

/// True if there is something to measure.
fn exists(stage: Stage, pass: Pass) -> bool {
    // The selection has no gradient; the backward of what it belongs to is that of `compressed`.
    STAGES.contains(&stage) && (pass == Pass::Forward || stage != Stage::Select)
}

impl Suite {
    /// Every suite.
    pub fn all() -> Outcome<Vec<Suite>> {
        BUILT_IN
            .iter()
            .map(|text| {
                serde_json::from_str(text)
                    .map_err(|error| Failure::misuse("bench/definitions", "a definition that parses", error))
            })
            .collect()
    }

    /// The suite of that name.
    pub fn find(name: &str) -> Outcome<Suite> {
        let mut suites = Self::all()?;
        let names: Vec<String> = suites.iter().map(|suite| suite.name.clone()).collect();
        match suites.iter().position(|suite| suite.name == name) {
            Some(place) => Ok(suites.swap_remove(place)),
            None => Err(Failure::misuse("--suite", format!("one of {}", names.join(", ")), name)),
        }
    }

    /// Its measurements, each once, in order. `tokens` replaces the lengths of all groups.
    pub fn points(&self, tokens: Option<&[usize]>) -> Vec<Point> {
        let mut points: Vec<Point> = Vec::new();
        for group in &self.groups {
            for point in group.points(&self.name, tokens) {
                if !points.contains(&point) {
                    points.push(point);
                }
            }
        }
        points
    }
}

impl Group {
    fn points(&self, suite: &str, tokens: Option<&[usize]>) -> Vec<Point> {
        let mut points = Vec::new();
        for config in &self.configs {
            for [num_q_heads, num_kv_heads] in self.heads.iter().copied() {
                for head_dim in self.head_dims.iter().copied() {
                    for dtype in self.dtypes.iter().copied() {
                        for tokens in tokens.unwrap_or(&self.tokens).iter().copied() {
                            for pass in self.passes.iter().copied() {
                                let stages = self.stages.iter().filter(|stage| exists(**stage, pass));
                                points.extend(stages.map(|stage| Point {
                                    definition: format!("{suite}/{}", self.name),
                                    stage: *stage,
                                    pass,
                                    dtype,
                                    tokens,
                                    num_q_heads,
                                    num_kv_heads,
                                    head_dim,
                                    config: config.clone(),
                                }));
                            }
                        }
                    }
                }
            }
        }
        points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_definition_parses_and_names_valid_points() {
        let suites = Suite::all().expect("definitions parse");
        for suite in &suites {
            assert!(!suite.description.is_empty());
            let points = suite.points(None);
            assert!(!points.is_empty(), "{}", suite.name);
            for point in points {
                point.config.validate().expect("valid parameters");
                assert!(point.num_q_heads.is_multiple_of(point.num_kv_heads), "{}", point.name());
            }
        }
    }

    #[test]
    fn the_acceptance_suite_holds_what_the_readme_promises() {
        let points = Suite::find("acceptance").expect("exists").points(None);
        let names: Vec<String> = points.iter().map(Point::name).collect();
        assert_eq!(
            names,
            [
                "dense/forward/f32/h8-2/d64/b64-16/n32768",
                "nsa/forward/f32/h8-2/d64/b64-16/n32768",
                "dense/forward/f32/h8-2/d64/b64-16/n65536",
                "nsa/forward/f32/h8-2/d64/b64-16/n65536",
                "dense/backward/f32/h8-2/d64/b64-16/n32768",
                "nsa/backward/f32/h8-2/d64/b64-16/n32768",
                "selected/forward/f32/h8-2/d64/b64-16/n16384",
            ]
        );
    }

    #[test]
    fn an_unknown_suite_is_named_with_the_known_ones() {
        let failure = Suite::find("fast").expect_err("unknown");
        assert!(failure.to_string().starts_with("--suite: expected one of acceptance, quick"), "{failure}");
    }
}
