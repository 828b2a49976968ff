//! What a launch takes in every stage: tensors on the device, the stream and the workspace, and the checks that make it sound.

use crate::arch::KernelSet;
use crate::driver::{Address, Boxes, Call, DeviceBatch, DeviceSpan, MapWords, Stream};
use crate::params::{self, TensorMap};
use crate::plan::Sizes;
use fsa_core::{DType, Error, Result};

/// log2(e): the kernels take powers of two.
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// Checks a factor of the logits. The kernels take the largest product for the largest logit.
pub(crate) fn check_scale(scale: f32) -> Result<()> {
    if scale.is_finite() && scale >= 0.0 {
        return Ok(());
    }
    Err(Error::Unsupported {
        constraint: "softmax_scale on CUDA".into(),
        got: scale.to_string(),
        supported: "finite and not negative: negate query instead".into(),
    })
}

/// The factor of the logits as the kernels take it. Never 0: minus infinity, which a masked logit is, would become NaN; the
/// smallest positive factor makes every finite logit 0 as well.
pub(crate) fn scale_log2(scale: f32) -> f32 {
    (scale * LOG2_E).max(f32::MIN_POSITIVE)
}

/// Checks that a batch has the sizes that were planned for.
pub(crate) fn check_batch(batch: &DeviceBatch<'_>, sizes: &Sizes) -> Result<()> {
    let planned = (sizes.sequences, sizes.total_q, sizes.total_kv);
    if batch.sizes() != planned {
        let text = |(sequences, q, kv)| format!("{sequences} sequences of together {q} rows and {kv} keys");
        return Err(Error::input("cu_seqlens_q", text(planned), text(batch.sizes())));
    }
    let bytes = (sizes.sequences + 1) * size_of::<i32>();
    let names = ["cu_seqlens_q", "cu_seqlens_kv"];
    names.into_iter().zip(batch.spans()).try_for_each(|(name, span)| check_words(name, &span, bytes))
}

/// Rows are read and written in pieces of 16 bytes.
const VECTOR_BYTES: usize = 16;

/// Checks size and alignment of a piece of memory.
pub(crate) fn check_span(name: &str, span: &DeviceSpan<'_>, bytes: usize) -> Result<()> {
    check_aligned(name, span, bytes, VECTOR_BYTES)
}

/// The same for memory that is read in pieces of `alignment` bytes.
pub(crate) fn check_aligned(name: &str, span: &DeviceSpan<'_>, bytes: usize, alignment: usize) -> Result<()> {
    if span.size_bytes() < bytes {
        let got = format!("{} bytes", span.size_bytes());
        return Err(Error::input(name, format!("{bytes} bytes of device memory"), got));
    }
    if !span.address().0.is_multiple_of(alignment as u64) {
        let got = format!("{:#x}", span.address().0);
        return Err(Error::input(name, format!("an address that is a multiple of {alignment}"), got));
    }
    if bytes > 0 && span.address() == Address::default() {
        return Err(Error::input(name, "device memory", "a null pointer"));
    }
    Ok(())
}

/// Checks a list of 4-byte words, which kernels read one by one.
pub(crate) fn check_words(name: &str, span: &DeviceSpan<'_>, bytes: usize) -> Result<()> {
    check_aligned(name, span, bytes, size_of::<u32>())
}

/// Kernels that gather rows have 32 bits for the bytes from one to the next.
fn require_short(name: &str, what: &str, stride: usize) -> Result<()> {
    if stride < 1 << 31 {
        return Ok(());
    }
    Err(Error::input(name, format!("{what} that are less than 2^31 elements apart"), stride.to_string()))
}

/// A part of `span`, or none of one that is empty.
pub(crate) fn part<'a>(span: &DeviceSpan<'a>, offset: usize) -> DeviceSpan<'a> {
    span.part(offset.min(span.size_bytes()), span.size_bytes().saturating_sub(offset))
}

/// A `[tokens, heads, head_dim]` tensor on the device; the elements of a vector are adjacent.
#[derive(Debug, Clone, Copy)]
pub struct TensorSpan<'a> {
    /// Its memory, from the first element on.
    pub span: DeviceSpan<'a>,
    /// Elements from one token to the next.
    pub row_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

impl<'a> TensorSpan<'a> {
    /// No tensor: for kernels that do not look at it.
    pub(crate) fn none() -> Self {
        Self { span: DeviceSpan::none(), row_stride: 0, head_stride: 0 }
    }

    /// A tensor without gaps.
    pub fn contiguous(span: DeviceSpan<'a>, heads: usize, head_dim: usize) -> Self {
        Self { span, row_stride: heads * head_dim, head_stride: head_dim }
    }

    /// Checks that the tensor has `rows` rows of `heads` vectors of `head_dim` elements inside its memory, in pieces of 16 bytes.
    pub(crate) fn require(&self, name: &str, [rows, heads]: [usize; 2], sizes: &Sizes) -> Result<()> {
        let element = sizes.dtype.size_bytes();
        if rows == 0 || heads == 0 {
            return Ok(());
        }
        let pieces = VECTOR_BYTES / element;
        if !self.row_stride.is_multiple_of(pieces) || !self.head_stride.is_multiple_of(pieces) {
            let got = format!("{} and {}", self.row_stride, self.head_stride);
            return Err(Error::input(name, format!("strides that are multiples of {pieces} elements"), got));
        }
        if rows > 1 {
            require_short(name, "rows", self.row_stride)?;
        }
        let last = (rows - 1).checked_mul(self.row_stride).zip((heads - 1).checked_mul(self.head_stride));
        let elements = last.and_then(|(row, head)| row.checked_add(head)?.checked_add(sizes.head_dim));
        let bytes = elements.and_then(|elements| elements.checked_mul(element)).unwrap_or(usize::MAX);
        check_span(name, &self.span, bytes)
    }

    /// Checks that heads lie as near to each other as kernels want that have several of them at once.
    pub(crate) fn require_near_heads(&self, name: &str, heads: usize) -> Result<()> {
        if heads > 1 { require_short(name, "heads", self.head_stride) } else { Ok(()) }
    }

    /// The heads from `first` on.
    pub(crate) fn heads_from(&self, first: usize, dtype: DType) -> Self {
        Self { span: part(&self.span, first * self.head_stride * dtype.size_bytes()), ..*self }
    }

    /// As the kernels take it.
    pub(crate) fn device(&self) -> params::Tensor {
        params::Tensor {
            data: self.span.address(),
            row_stride: self.row_stride as i64,
            head_stride: self.head_stride as i64,
        }
    }

    /// As Hopper's kernels copy it, in boxes of `extent` tokens and heads; nothing where the kernels are portable, or of no tensor.
    pub(crate) fn map(
        &self,
        set: KernelSet,
        shape: [usize; 2],
        extent: [usize; 2],
        sizes: &Sizes,
    ) -> Result<TensorMap> {
        self.map_of_every(1, set, (shape, extent), sizes)
    }

    /// The same, with boxes that hold the first of every `token_step` tokens.
    pub(crate) fn map_of_every(
        &self,
        token_step: usize,
        set: KernelSet,
        (shape, extent): ([usize; 2], [usize; 2]),
        sizes: &Sizes,
    ) -> Result<TensorMap> {
        self.device().map_of_every(token_step, set, (shape, extent), sizes)
    }

    /// What a launch takes of it.
    pub(crate) fn numbers(&self) -> [u64; 3] {
        [self.span.address().0, self.row_stride as u64, self.head_stride as u64]
    }
}

impl params::Tensor {
    /// As [`TensorSpan::map_of_every`].
    pub(crate) fn map_of_every(
        &self,
        token_step: usize,
        set: KernelSet,
        ([rows, heads], extent): ([usize; 2], [usize; 2]),
        sizes: &Sizes,
    ) -> Result<TensorMap> {
        if set == KernelSet::Sm80 || self.data == Address::default() {
            return Ok(TensorMap { words: MapWords::default() });
        }
        let element = sizes.dtype.size_bytes();
        let boxes = Boxes {
            data: self.data,
            shape: [rows, heads, sizes.head_dim],
            stride_bytes: [self.row_stride, self.head_stride].map(|stride| stride as usize * element),
            extent,
            token_step,
            is_bf16: sizes.dtype == DType::Bf16,
        };
        Ok(TensorMap { words: MapWords::new(&boxes)? })
    }
}

/// What every launch takes besides its tensors.
#[derive(Debug, Clone, Copy)]
pub struct LaunchContext<'a> {
    /// Work is ordered after what the stream was given before, and before what it is given later.
    pub stream: &'a Stream,
    /// Scratch memory of the size that the plan names; its content means nothing before and after.
    pub workspace: DeviceSpan<'a>,
}

impl LaunchContext<'_> {
    /// The same on another stream.
    pub(crate) fn on<'s>(&'s self, stream: &'s Stream) -> LaunchContext<'s> {
        LaunchContext { stream, workspace: self.workspace }
    }

    /// Everything that a call gives to the device: that of its tensors, completed.
    pub(crate) fn call(&self, mut tensors: Call, batch: &DeviceBatch<'_>, scale: f32) -> Call {
        tensors.extend(batch.spans().map(|span| span.address().0));
        tensors.extend([self.workspace.address().0, scale.to_bits().into()]);
        tensors
    }
}
