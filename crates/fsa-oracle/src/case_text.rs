//! The one-line text of a [`Case`]: `stage:pass:dtype` and then `name=value`, by which `fsa check --case` repeats it.
//!
//! Seed, lengths, heads and dimensions always appear; the rest only where it is not the default.

use crate::case::{Case, Pass};
use fsa_core::ops::GateLayout;
use fsa_core::{Error, Result, ScoreHeads};
use std::fmt::{self, Display};
use std::str::FromStr;

fn join(lengths: &[usize]) -> String {
    lengths.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Optional fields as text, `None` where the value is the default.
fn optional_fields(case: &Case) -> Vec<(&'static str, Option<String>)> {
    fn field<T: PartialEq + Display>(name: &'static str, value: T, default: T) -> (&'static str, Option<String>) {
        (name, (value != default).then(|| value.to_string()))
    }
    let default = Case::new(case.stage, case.pass, case.dtype);
    let (config, plain) = (&case.config, &default.config);
    vec![
        field("l", config.kernel_size, plain.kernel_size),
        field("s", config.kernel_stride, plain.kernel_stride),
        field("block", config.block_size, plain.block_size),
        field("topk", config.topk, plain.topk),
        field("init", config.init_blocks, plain.init_blocks),
        field("local", config.local_blocks, plain.local_blocks),
        field("window", config.window_size, plain.window_size),
        field("score_heads", score_heads_name(config.score_heads), score_heads_name(plain.score_heads)),
        field("gates", gates_name(case.gates), gates_name(default.gates)),
        field("keys", case.key_compression, default.key_compression),
        field("values", case.value_compression, default.value_compression),
        field("rope", case.rope, default.rope),
        ("scale", case.softmax_scale.map(|scale| scale.to_string())),
        field("grad_lse", case.grad_lse, default.grad_lse),
        field("layout", case.layout, default.layout),
        field("hostile", case.hostile, default.hostile),
    ]
}

const SCORE_HEADS: [(&str, ScoreHeads); 2] =
    [("group_sum", ScoreHeads::GroupSum), ("first_head", ScoreHeads::FirstHead)];
const GATES: [(&str, GateLayout); 2] = [("per_row", GateLayout::PerRow), ("per_head", GateLayout::PerHead)];

fn name_of<T: PartialEq>(names: &[(&'static str, T)], value: &T) -> &'static str {
    names.iter().find(|(_, v)| v == value).map_or("", |(name, _)| name)
}

fn score_heads_name(value: ScoreHeads) -> &'static str {
    name_of(&SCORE_HEADS, &value)
}

fn gates_name(value: GateLayout) -> &'static str {
    name_of(&GATES, &value)
}

fn by_name<T: Copy>(field: &str, names: &[(&'static str, T)], text: &str) -> Result<T> {
    names.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
        let all: Vec<_> = names.iter().map(|(name, _)| *name).collect();
        Error::input(field, format!("one of {}", all.join(", ")), text)
    })
}

impl Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:seed={}", self.stage, self.pass, self.dtype, self.seed)?;
        write!(f, ":q={}:kv={}", join(&self.query_lens), join(&self.kv_lens))?;
        write!(f, ":hq={}:hkv={}", self.num_q_heads, self.num_kv_heads)?;
        write!(f, ":d={}:dv={}", self.head_dim, self.value_dim)?;
        for (name, value) in optional_fields(self) {
            if let Some(value) = value {
                write!(f, ":{name}={value}")?;
            }
        }
        Ok(())
    }
}

fn number<T: FromStr>(field: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::input(field, "a number", text))
}

fn lengths(field: &str, text: &str) -> Result<Vec<usize>> {
    text.split(',').map(|length| number(field, length)).collect()
}

impl FromStr for Case {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.trim().split(':');
        let mut head = |what: &str| {
            parts.next().filter(|part| !part.is_empty()).ok_or_else(|| {
                Error::input("case", format!("stage:pass:dtype:name=value.. with a {what}"), format!("{text:?}"))
            })
        };
        let stage = head("stage")?.parse()?;
        let pass: Pass = head("pass")?.parse()?;
        let mut case = Case::new(stage, pass, head("dtype")?.parse()?);
        let (mut kv, mut value_dim) = (None, None);
        for part in parts {
            let (name, value) = part
                .split_once('=')
                .ok_or_else(|| Error::input("case", "name=value between colons", format!("{part:?}")))?;
            match name {
                "kv" => kv = Some(lengths(name, value)?),
                "dv" => value_dim = Some(number(name, value)?),
                _ => set_field(&mut case, name, value)?,
            }
        }
        case.kv_lens = kv.unwrap_or_else(|| case.query_lens.clone());
        case.value_dim = value_dim.unwrap_or(case.head_dim);
        case.validate()?;
        Ok(case)
    }
}

fn set_field(case: &mut Case, name: &str, value: &str) -> Result<()> {
    match name {
        "seed" => case.seed = number(name, value)?,
        "q" => case.query_lens = lengths(name, value)?,
        "hq" => case.num_q_heads = number(name, value)?,
        "hkv" => case.num_kv_heads = number(name, value)?,
        "d" => case.head_dim = number(name, value)?,
        "l" => case.config.kernel_size = number(name, value)?,
        "s" => case.config.kernel_stride = number(name, value)?,
        "block" => case.config.block_size = number(name, value)?,
        "topk" => case.config.topk = number(name, value)?,
        "init" => case.config.init_blocks = number(name, value)?,
        "local" => case.config.local_blocks = number(name, value)?,
        "window" => case.config.window_size = number(name, value)?,
        "score_heads" => case.config.score_heads = by_name(name, &SCORE_HEADS, value)?,
        "gates" => case.gates = by_name(name, &GATES, value)?,
        "keys" => case.key_compression = value.parse()?,
        "values" => case.value_compression = value.parse()?,
        "rope" => case.rope = value.parse()?,
        "scale" => case.softmax_scale = Some(number(name, value)?),
        "grad_lse" => case.grad_lse = number(name, value)?,
        "layout" => case.layout = value.parse()?,
        "hostile" => case.hostile = value.parse()?,
        _ => return Err(Error::input("case", "a field of a case", name)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_only_what_it_needs() {
        let line = "selected:backward:bf16:seed=17:q=33,0,64:kv=40,0,64:hq=6:hkv=2:d=64:dv=64:block=16:topk=4:hostile=logit_offset";
        assert_eq!(line.parse::<Case>().expect("valid").to_string(), line);
        let short: Case = "dense:forward:f32:q=5:d=8".parse().expect("valid");
        assert_eq!((short.kv_lens, short.value_dim), (vec![5], 8));
    }

    #[test]
    fn a_broken_line_says_what_is_wrong() {
        let lines = [
            ("", "stage"),
            ("dense", "pass"),
            ("dense:sideways:f32", "one of forward, backward"),
            ("dense:forward:i32", "f32, bf16 or f16"),
            ("dense:forward:f32:q=5:kv=4", "at most 4 query rows"),
            ("dense:forward:f32:speed=5", "speed"),
            ("dense:forward:f32:q", "name=value"),
            ("dense:forward:f32:hq=3:hkv=2", "multiple of hkv 2"),
            ("dense:forward:f32:d=12", "multiple of 8"),
            ("select:backward:f32", "no gradient"),
        ];
        for (line, text) in lines {
            let error = line.parse::<Case>().expect_err(line);
            assert!(error.to_string().contains(text), "{line}: {error}");
        }
    }
}
