//! The tensors of a case: random numbers, and what its hostile kind does to them.

use crate::attention::{self, places};
use crate::buffer::Buffer;
use crate::case::{Case, Hostile};
use crate::random::Random;
use fsa_core::{AttentionArgs, AttentionStage, Batch, DType, Error, Result, Stage};
use std::ops::Range;

/// Which stream of random numbers a tensor takes.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Stream {
    Query = 1,
    Key,
    Value,
    GradOut,
    GradLse,
    Selection,
    Poison,
    Gates,
    KeyWeight,
    KeyPosition,
    ValueWeight,
    ValuePosition,
    Noise,
}

/// A generator for one stream of a case.
pub fn random(case: &Case, stream: Stream) -> Random {
    Random::new(&[case.seed, stream as u64])
}

/// A tensor of normal numbers times `factor`, in the dtype and layout of the case.
pub fn normal(case: &Case, name: &'static str, stream: Stream, shape: &[usize], factor: f64) -> Buffer {
    let mut random = random(case, stream);
    let values = std::iter::repeat_with(move || random.normal() * factor);
    Buffer::from_f64(name, case.dtype, shape, case.layout, values)
}

/// Factors of query and key, of value, and of gradients. Powers of two; none lets f16 overflow.
pub fn magnitudes(case: &Case) -> (f64, f64, f64) {
    match case.hostile {
        // The gradients of the whole operation multiply more of them.
        Hostile::Huge if case.stage == Stage::Nsa => (4.0, 4.0, 1.0),
        Hostile::Huge => (16.0, 16.0, 1.0),
        Hostile::Tiny => (1.0 / 64.0, 1.0 / 256.0, 1.0 / 256.0),
        _ => (1.0, 1.0, 1.0),
    }
}

/// Inputs of an attention stage, and of `select`.
#[derive(Debug, Clone)]
pub struct AttentionData {
    /// The case.
    pub case: Case,
    /// Its sequences.
    pub batch: Batch,
    /// `[total_q, num_q_heads, head_dim]`.
    pub query: Buffer,
    /// `[total_keys, num_kv_heads, head_dim]`.
    pub key: Buffer,
    /// `[total_keys, num_kv_heads, value_dim]`.
    pub value: Buffer,
    /// `[num_kv_heads, total_q, topk]`, for stage `selected`.
    pub topk_indices: Option<Buffer>,
    /// Gradient of `out`.
    pub grad_out: Buffer,
    /// Gradient of `lse`.
    pub grad_lse: Option<Buffer>,
}

impl AttentionData {
    /// Builds the tensors of a case.
    pub fn new(case: &Case) -> Result<Self> {
        let batch = case.batch()?;
        let (qk, v, grad) = magnitudes(case);
        let (q_heads, kv_heads) = (case.num_q_heads, case.num_kv_heads);
        let total_q = batch.total_q();
        let total_keys = match case.stage {
            Stage::Compressed | Stage::Select => {
                batch.total_compressed(case.config.kernel_size, case.config.kernel_stride.max(1))
            }
            _ => batch.total_kv(),
        };
        let topk_indices = (case.stage == Stage::Selected).then(|| selection(case, &batch));
        let grad_lse = case.grad_lse.then(|| {
            let mut random = random(case, Stream::GradLse);
            let values = std::iter::repeat_with(move || random.normal() * grad);
            Buffer::from_f64("grad_lse", DType::F32, &[q_heads, total_q], case.layout, values)
        });
        let tensor = |name, stream, shape: [usize; 3], factor| normal(case, name, stream, &shape, factor);
        let mut data = Self {
            query: tensor("query", Stream::Query, [total_q, q_heads, case.head_dim], qk),
            key: tensor("key", Stream::Key, [total_keys, kv_heads, case.head_dim], qk),
            value: tensor("value", Stream::Value, [total_keys, kv_heads, case.value_dim], v),
            grad_out: tensor("grad_out", Stream::GradOut, [total_q, q_heads, case.value_dim], grad),
            grad_lse,
            topk_indices,
            batch,
            case: case.clone(),
        };
        data.shift_logits()?;
        data.poison()?;
        Ok(data)
    }

    /// The stage with its parameters.
    pub fn stage(&self) -> Result<AttentionStage<'_>> {
        let config = &self.case.config;
        match self.case.stage {
            // Dense attention sees all that any branch of the whole operation may see.
            Stage::Dense | Stage::Nsa => Ok(AttentionStage::Dense),
            Stage::Window => Ok(AttentionStage::Window { window_size: config.window_size }),
            Stage::Compressed | Stage::Select => Ok(fsa_core::backend::compressed_stage(config)),
            Stage::Selected => {
                let ids = self.topk_indices.as_ref().ok_or_else(|| Error::input("topk_indices", "a tensor", "none"))?;
                let (topk_indices, block_size) = (ids.view()?, config.block_size);
                Ok(AttentionStage::Selected { topk_indices, block_size, validate: false })
            }
            other => Err(Error::input("stage", "an attention stage", other)),
        }
    }

    /// The arguments of the call.
    pub fn args(&self) -> Result<AttentionArgs<'_>> {
        Ok(AttentionArgs {
            query: self.query.view()?,
            key: self.key.view()?,
            value: self.value.view()?,
            batch: &self.batch,
            softmax_scale: self.case.softmax_scale,
        })
    }

    /// Gives the first component of query and key values whose product shifts the logits.
    fn shift_logits(&mut self) -> Result<()> {
        const QUERY: f64 = 16.0;
        let shift = match self.case.hostile {
            Hostile::LogitOffset => 200.0,
            Hostile::LogitOffsetNegative => -200.0,
            // exp(-400) is 0 in f32 and in any format that a backend may keep a probability in.
            Hostile::Peaked => 400.0,
            _ => return Ok(()),
        };
        let per_key = shift / (f64::from(self.args()?.scale()) * QUERY);
        let peaks = self.peaks();
        let peaked = self.case.hostile == Hostile::Peaked;
        set_component(&mut self.query, |_| Some(QUERY))?;
        set_component(&mut self.key, |row| match peaked {
            true => Some(if peaks.contains(&row) { per_key } else { 0.0 }),
            false => Some(per_key),
        })
    }

    /// Rows of `key` of every sequence.
    fn key_rows(&self) -> Vec<Range<usize>> {
        let config = &self.case.config;
        let (l, s) = (config.kernel_size, config.kernel_stride.max(1));
        match self.case.stage {
            Stage::Compressed | Stage::Select => {
                self.batch.compressed_offsets(l, s).windows(2).map(|pair| pair[0]..pair[1]).collect()
            }
            _ => self.batch.sequences().iter().map(|sequence| sequence.kv_rows.clone()).collect(),
        }
    }

    /// One key row in the first half of every sequence.
    fn peaks(&self) -> Vec<usize> {
        let mut random = random(&self.case, Stream::Poison);
        let rows = self.key_rows().into_iter();
        rows.map(|rows| rows.start + random.below(rows.len().div_ceil(2))).collect()
    }

    /// A key row that some queries see and others, before it, do not: in the later half of a sequence with queries.
    fn future(&self) -> Option<usize> {
        let mut random = random(&self.case, Stream::Poison);
        let sequences = self.batch.sequences().iter().zip(self.key_rows());
        let rows = sequences.filter(|(sequence, _)| sequence.query_len() > 0).map(|(_, rows)| rows);
        let rows = rows.max_by_key(ExactSizeIterator::len).filter(|rows| !rows.is_empty())?;
        Some(rows.end - 1 - random.below(rows.len().div_ceil(2)))
    }

    /// Puts NaN and infinities where the hostile kind says.
    fn poison(&mut self) -> Result<()> {
        let rows: Vec<[usize; 2]> = match self.case.hostile {
            Hostile::NanUnseen => self.unseen()?,
            Hostile::NanFuture => {
                let row = self.future();
                (0..self.case.num_kv_heads).filter_map(|head| row.map(|row| [row, head])).collect()
            }
            _ => return Ok(()),
        };
        let unseen = self.case.hostile == Hostile::NanUnseen;
        for (number, index) in rows.iter().enumerate() {
            // An infinity that is seen may meet a probability that f32 rounds to 0 and f64 does not.
            let value = if unseen { [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][number % 3] } else { f64::NAN };
            self.key.set_row(index, |_| value);
            self.value.set_row(index, |_| value);
        }
        Ok(())
    }

    /// Key rows and kv heads that no query sees.
    fn unseen(&self) -> Result<Vec<[usize; 2]>> {
        let visible = attention::visible(&self.stage()?, &self.batch)?;
        let mut unseen = Vec::new();
        for head in 0..self.case.num_kv_heads {
            let mut seen = vec![false; self.key.shape()[0]];
            for place in places(&self.batch, head) {
                visible(&place).into_iter().for_each(|key| seen[key] = true);
            }
            unseen.extend((0..seen.len()).filter(|row| !seen[*row]).map(|row| [row, head]));
        }
        Ok(unseen)
    }
}

/// Replaces the first component of every vector of a row.
fn set_component(buffer: &mut Buffer, value: impl Fn(usize) -> Option<f64>) -> Result<()> {
    let shape = buffer.shape().to_vec();
    let old = crate::array::Array::from_view(&buffer.view()?);
    for row in 0..shape[0] {
        for head in 0..shape[1] {
            if let Some(first) = value(row) {
                let vector = old.row(&[row, head]);
                buffer.set_row(&[row, head], |k| if k == 0 { first } else { vector[k] });
            }
        }
    }
    Ok(())
}

/// Random lists of blocks.
fn selection(case: &Case, batch: &Batch) -> Buffer {
    let (block, topk) = (case.config.block_size.max(1), case.config.topk);
    let mut random = random(case, Stream::Selection);
    // One id that nobody lists: with few blocks it is often the own block of some rows.
    let excluded = matches!(case.hostile, Hostile::NobodyChooses | Hostile::NanUnseen).then(|| random.below(3));
    let mut ids = Vec::new();
    for head in 0..case.num_kv_heads {
        for place in places(batch, head) {
            ids.extend(row_selection(case, &mut random, place.position / block, excluded, topk));
        }
    }
    let shape = [case.num_kv_heads, batch.total_q(), topk];
    Buffer::from_f64("topk_indices", DType::I32, &shape, case.layout, ids.into_iter().map(f64::from))
}

fn row_selection(case: &Case, random: &mut Random, own: usize, excluded: Option<usize>, topk: usize) -> Vec<i32> {
    let mut candidates: Vec<usize> = (0..=own).filter(|block| Some(*block) != excluded).collect();
    random.shuffle(&mut candidates);
    if case.hostile == Hostile::AllChoose
        && let Some(first) = candidates.iter().position(|block| *block == 0)
    {
        candidates.swap(0, first);
    }
    let most = topk.min(candidates.len());
    let fewest = usize::from(case.hostile == Hostile::AllChoose).min(most);
    let count = if random.once_in(4) { fewest + random.below(most + 1 - fewest) } else { most };
    let mut row: Vec<i32> = candidates[..count].iter().map(|block| *block as i32).collect();
    let in_order = random.once_in(2);
    if in_order {
        row.sort_unstable();
    }
    let absurd = case.hostile == Hostile::AbsurdIndices;
    while row.len() < topk {
        let future = own as i32 + 1 + random.below(3) as i32;
        let junk = [-1, -2, i32::MIN, i32::MAX, future, 1 << 20, -1_000_000_007];
        row.push(if absurd { junk[random.below(junk.len())] } else { -1 });
    }
    if absurd || !in_order {
        random.shuffle(&mut row);
    }
    row
}
