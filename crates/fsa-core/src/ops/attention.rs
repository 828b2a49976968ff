//! Arguments of the attention stages: dense, window, compressed, selected.

use super::{expect_mut, expect_view, rank3};
use crate::batch::Batch;
use crate::config::{BLOCK_SIZES, NsaConfig};
use crate::dtype::DType;
use crate::error::{Error, Result, ensure};
use crate::selection;
use crate::stage::Stage;
use crate::tensor::{TensorView, TensorViewMut};

/// Largest supported `head_dim` and `value_dim`.
pub const MAX_HEAD_DIM: usize = 256;

/// Which keys a row sees.
#[derive(Debug, Clone, Copy)]
pub enum AttentionStage<'a> {
    /// Every key at or before the row's position.
    Dense,
    /// Keys `position - window_size ..= position`.
    Window {
        /// Earlier keys shown besides the row's own position.
        window_size: usize,
    },
    /// Compressed keys whose whole window lies at or before the row's position. `key` and `value`
    /// hold the compressed rows of all sequences, `[batch.total_compressed(..), num_kv_heads, _]`.
    Compressed {
        /// Tokens in a window.
        kernel_size: usize,
        /// Tokens between the starts of neighbouring windows.
        kernel_stride: usize,
    },
    /// Keys at or before the row's position in the blocks that it lists.
    Selected {
        /// `[num_kv_heads, total_q, topk]` i32, ids local to the sequence.
        topk_indices: TensorView<'a>,
        /// Keys in a block.
        block_size: usize,
        /// Refuse ids that are out of range or repeated in a row, instead of ignoring the former.
        validate: bool,
    },
}

impl AttentionStage<'_> {
    /// Its name.
    pub fn stage(&self) -> Stage {
        match self {
            AttentionStage::Dense => Stage::Dense,
            AttentionStage::Window { .. } => Stage::Window,
            AttentionStage::Compressed { .. } => Stage::Compressed,
            AttentionStage::Selected { .. } => Stage::Selected,
        }
    }

    /// Rows of `key` that the stage expects for `batch`.
    pub fn total_keys(&self, batch: &Batch) -> usize {
        match self {
            AttentionStage::Compressed { kernel_size, kernel_stride } => {
                batch.total_compressed(*kernel_size, *kernel_stride)
            }
            _ => batch.total_kv(),
        }
    }
}

/// Checked sizes of an attention call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Rows of `query`.
    pub total_q: usize,
    /// Rows of `key` and `value`.
    pub total_keys: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a query or key vector.
    pub head_dim: usize,
    /// Elements of a value or output vector.
    pub value_dim: usize,
    /// Type of `query`, `key`, `value` and the output.
    pub dtype: DType,
}

impl AttentionShape {
    /// Query heads that share one kv head.
    pub fn gqa_group_size(&self) -> usize {
        self.num_q_heads / self.num_kv_heads.max(1)
    }

    /// Shape of `out`.
    pub fn out(&self) -> [usize; 3] {
        [self.total_q, self.num_q_heads, self.value_dim]
    }

    /// Shape of `lse`.
    pub fn lse(&self) -> [usize; 2] {
        [self.num_q_heads, self.total_q]
    }
}

/// Inputs of an attention stage.
#[derive(Debug, Clone, Copy)]
pub struct AttentionArgs<'a> {
    /// `[total_q, num_q_heads, head_dim]`.
    pub query: TensorView<'a>,
    /// `[total_kv, num_kv_heads, head_dim]`, or the compressed keys.
    pub key: TensorView<'a>,
    /// `[total_kv, num_kv_heads, value_dim]`, or the compressed values.
    pub value: TensorView<'a>,
    /// Where the sequences lie.
    pub batch: &'a Batch,
    /// Factor of the logits; `None` is `head_dim^-0.5`.
    pub softmax_scale: Option<f32>,
}

impl AttentionArgs<'_> {
    /// The factor of the logits.
    pub fn scale(&self) -> f32 {
        let head_dim = self.query.shape().get(2).copied().unwrap_or(1).max(1);
        self.softmax_scale.unwrap_or(1.0 / (head_dim as f32).sqrt())
    }

    /// Checks everything for `stage` and returns the sizes.
    pub fn shape(&self, stage: &AttentionStage<'_>) -> Result<AttentionShape> {
        let [total_q, num_q_heads, head_dim] = rank3("query", "[total_q, num_q_heads, head_dim]", &self.query)?;
        let [total_keys, num_kv_heads, _] = rank3("key", "[total_kv, num_kv_heads, head_dim]", &self.key)?;
        let [_, _, value_dim] = rank3("value", "[total_kv, num_kv_heads, value_dim]", &self.value)?;
        let dtype = self.query.dtype();
        ensure(
            total_q == self.batch.total_q(),
            "query",
            || format!("{} rows, the last element of cu_seqlens_q", self.batch.total_q()),
            || format!("{total_q} rows"),
        )?;
        let rows = stage.total_keys(self.batch);
        ensure(
            total_keys == rows,
            "key",
            || format!("{rows} rows, by cu_seqlens_kv"),
            || format!("{total_keys} rows"),
        )?;
        ensure(
            num_kv_heads > 0 && num_q_heads > 0 && num_q_heads.is_multiple_of(num_kv_heads),
            "query",
            || format!("a positive number of heads that is a multiple of num_kv_heads {num_kv_heads}"),
            || format!("{num_q_heads} heads"),
        )?;
        check_head_dim("head_dim", head_dim)?;
        check_head_dim("value_dim", value_dim)?;
        expect_view("key", dtype, &[total_keys, num_kv_heads, head_dim], &self.key)?;
        expect_view("value", dtype, &[total_keys, num_kv_heads, value_dim], &self.value)?;
        let scale = self.scale();
        ensure(scale.is_finite(), "softmax_scale", || "a finite number".into(), || scale.to_string())?;
        self.check_stage(stage, num_kv_heads, total_q)?;
        Ok(AttentionShape { total_q, total_keys, num_q_heads, num_kv_heads, head_dim, value_dim, dtype })
    }

    fn check_stage(&self, stage: &AttentionStage<'_>, num_kv_heads: usize, total_q: usize) -> Result<()> {
        match stage {
            AttentionStage::Dense | AttentionStage::Window { .. } => Ok(()),
            AttentionStage::Compressed { kernel_size, kernel_stride } => NsaConfig {
                kernel_size: *kernel_size,
                kernel_stride: *kernel_stride,
                block_size: 256,
                ..NsaConfig::default()
            }
            .validate()
            .or_else(|error| if error.argument() == Some("block_size") { Ok(()) } else { Err(error) }),
            AttentionStage::Selected { topk_indices, block_size, validate } => {
                ensure(
                    BLOCK_SIZES.contains(block_size),
                    "block_size",
                    || "one of 16, 32, 64, 128, 256".into(),
                    || block_size.to_string(),
                )?;
                let typed = selection::check(topk_indices, num_kv_heads, total_q)?;
                if *validate { selection::validate(&typed, self.batch, *block_size) } else { Ok(()) }
            }
        }
    }
}

fn check_head_dim(argument: &str, dim: usize) -> Result<()> {
    if dim > 0 && dim <= MAX_HEAD_DIM && dim.is_multiple_of(8) {
        return Ok(());
    }
    Err(Error::Unsupported {
        constraint: argument.into(),
        got: dim.to_string(),
        supported: format!("multiples of 8 up to {MAX_HEAD_DIM}"),
    })
}

/// What the forward of an attention stage writes.
#[derive(Debug)]
pub struct AttentionOutput<'a> {
    /// `[total_q, num_q_heads, value_dim]`, dtype of the inputs.
    pub out: TensorViewMut<'a>,
    /// `[num_q_heads, total_q]` f32, natural logarithm of the softmax denominator.
    pub lse: TensorViewMut<'a>,
}

impl AttentionOutput<'_> {
    /// Checks the outputs against the sizes of the call.
    pub fn validate(&self, shape: &AttentionShape) -> Result<()> {
        expect_mut("out", shape.dtype, &shape.out(), &self.out)?;
        expect_mut("lse", DType::F32, &shape.lse(), &self.lse)
    }
}

/// What the backward of an attention stage takes besides the forward's inputs.
#[derive(Debug, Clone, Copy)]
pub struct AttentionGradArgs<'a> {
    /// The forward's `out`.
    pub out: TensorView<'a>,
    /// The forward's `lse`.
    pub lse: TensorView<'a>,
    /// Gradient of `out`, same shape and dtype.
    pub grad_out: TensorView<'a>,
    /// Gradient of `lse`, `[num_q_heads, total_q]` f32, if any reached it.
    pub grad_lse: Option<TensorView<'a>>,
}

impl AttentionGradArgs<'_> {
    /// Checks the tensors against the sizes of the call.
    pub fn validate(&self, shape: &AttentionShape) -> Result<()> {
        expect_view("out", shape.dtype, &shape.out(), &self.out)?;
        expect_view("lse", DType::F32, &shape.lse(), &self.lse)?;
        expect_view("grad_out", shape.dtype, &shape.out(), &self.grad_out)?;
        self.grad_lse.as_ref().map_or(Ok(()), |grad| expect_view("grad_lse", DType::F32, &shape.lse(), grad))
    }
}

/// What the backward of an attention stage writes; shapes and dtype of the inputs.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct AttentionGrads<'a> {
    pub grad_query: TensorViewMut<'a>,
    pub grad_key: TensorViewMut<'a>,
    pub grad_value: TensorViewMut<'a>,
}

impl AttentionGrads<'_> {
    /// Checks the outputs against the sizes of the call.
    pub fn validate(&self, shape: &AttentionShape) -> Result<()> {
        let (q, kv) = (shape.num_q_heads, shape.num_kv_heads);
        expect_mut("grad_query", shape.dtype, &[shape.total_q, q, shape.head_dim], &self.grad_query)?;
        expect_mut("grad_key", shape.dtype, &[shape.total_keys, kv, shape.head_dim], &self.grad_key)?;
        expect_mut("grad_value", shape.dtype, &[shape.total_keys, kv, shape.value_dim], &self.grad_value)
    }
}

/// Inputs of stage `select`: compressed attention that also scores the blocks and lists the top-k of every row.
#[derive(Debug, Clone, Copy)]
pub struct SelectArgs<'a> {
    /// Query, compressed keys and compressed values.
    pub attention: AttentionArgs<'a>,
    /// Window geometry, block size, top-k and its forced blocks, which heads vote.
    pub config: &'a NsaConfig,
}

impl<'a> SelectArgs<'a> {
    /// The attention stage whose probabilities are scored.
    pub fn stage(&self) -> AttentionStage<'a> {
        AttentionStage::Compressed { kernel_size: self.config.kernel_size, kernel_stride: self.config.kernel_stride }
    }

    /// Checks everything, the output `topk_indices` included, and returns the sizes.
    pub fn shape(&self, topk_indices: &TensorViewMut<'_>) -> Result<AttentionShape> {
        self.config.validate()?;
        let shape = self.attention.shape(&self.stage())?;
        let expected = [shape.num_kv_heads, shape.total_q, self.config.topk];
        expect_mut("topk_indices", DType::I32, &expected, topk_indices)?;
        Ok(shape)
    }
}
