//! A case of the conformance suite: everything that decides one call, in one line of text.

use fsa_core::config::BLOCK_SIZES;
use fsa_core::ops::GateLayout;
use fsa_core::{Batch, DType, Error, NsaConfig, Result, Rope, RopeScaling, Stage};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Declares an enum whose variants have one-word names in text.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident: $what:literal { $($(#[$doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$doc])* $variant),+ }

        impl $name {
            /// Every value.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The word that stands for it in a case line.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self> {
                let found = Self::ALL.iter().copied().find(|value| value.name() == text);
                found.ok_or_else(|| {
                    let names: Vec<_> = Self::ALL.iter().map(|value| value.name()).collect();
                    Error::input($what, format!("one of {}", names.join(", ")), text)
                })
            }
        }
    };
}

words! {
    /// Direction of a call.
    Pass: "pass" {
        /// The outputs.
        Forward = "forward",
        /// The gradients.
        Backward = "backward",
    }
}

words! {
    /// How the tensors of a case lie in memory.
    ViewLayout: "layout" {
        /// Row-major.
        Contiguous = "contiguous",
        /// Row-major with unused elements after every vector and every row.
        Padded = "padded",
        /// The first two axes swapped: `[heads, rows, dim]` in memory.
        HeadMajor = "head_major",
        /// Neighbouring elements of a vector two apart.
        Interleaved = "interleaved",
    }
}

words! {
    /// What makes the input of a case unpleasant.
    Hostile: "hostile" {
        /// Nothing.
        None = "none",
        /// NaN and infinities in every key and value row that no query sees.
        NanUnseen = "nan_unseen",
        /// NaN in one key and value row, seen by some queries and not by others.
        NanFuture = "nan_future",
        /// Every logit shifted by about 200.
        LogitOffset = "logit_offset",
        /// Every logit shifted by about -200.
        LogitOffsetNegative = "logit_offset_negative",
        /// Ids that are negative, in the future, beyond the last block or extreme, between valid ones, in any order.
        AbsurdIndices = "absurd_indices",
        /// A block that every row lists.
        AllChoose = "all_choose",
        /// A block that no row lists.
        NobodyChooses = "nobody_chooses",
        /// Large inputs: the softmax is one-hot.
        Huge = "huge",
        /// Inputs near the bottom of f16: the softmax is uniform.
        Tiny = "tiny",
        /// One key takes all of the probability, the others underflow to exactly 0: ties.
        Peaked = "peaked",
        /// Positions beyond a million.
        FarPositions = "far_positions",
        /// Gates of any sign: all below zero, or of both signs, or with zeros between them.
        SignedGates = "signed_gates",
    }
}

words! {
    /// How keys or values are compressed.
    CompressionKind: "compression" {
        /// The mean.
        Mean = "mean",
        /// A weighted sum.
        Weighted = "weighted",
        /// A linear map.
        Linear = "linear",
        /// A linear map after a position embedding was added.
        LinearPosition = "linear_position",
    }
}

words! {
    /// Rotary embedding of a case.
    RopeKind: "rope" {
        /// None; stage `rope` takes this as `default`.
        None = "none",
        /// Base 10,000.
        Default = "default",
        /// Base 500,000, Llama 3 scaling.
        Llama3 = "llama3",
    }
}

impl RopeKind {
    /// Its parameters. The original context is short, so that small heads meet all three ranges of the scaling.
    pub fn rope(self) -> Option<Rope> {
        match self {
            RopeKind::None => None,
            RopeKind::Default => Some(Rope::default()),
            RopeKind::Llama3 => Some(Rope {
                theta: 500_000.0,
                scaling: RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position: 512,
                },
            }),
        }
    }
}

/// One call of one stage. Fields that the stage does not read keep their defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The stage under test.
    pub stage: Stage,
    /// Forward or backward.
    pub pass: Pass,
    /// Type of the tensors.
    pub dtype: DType,
    /// Seed of every random number of the inputs.
    pub seed: u64,
    /// Query rows of every sequence.
    pub query_lens: Vec<usize>,
    /// Keys of every sequence.
    pub kv_lens: Vec<usize>,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a query or key vector.
    pub head_dim: usize,
    /// Elements of a value vector.
    pub value_dim: usize,
    /// Parameters.
    pub config: NsaConfig,
    /// Shape of the gates.
    pub gates: GateLayout,
    /// Compression of keys (and of the input of stage `compress`).
    pub key_compression: CompressionKind,
    /// Compression of values.
    pub value_compression: CompressionKind,
    /// Rotary embedding.
    pub rope: RopeKind,
    /// Factor of the logits.
    pub softmax_scale: Option<f32>,
    /// Whether `lse` receives a gradient.
    pub grad_lse: bool,
    /// Memory layout of every tensor.
    pub layout: ViewLayout,
    /// What is unpleasant about it.
    pub hostile: Hostile,
}

impl Case {
    /// A plain case: one sequence of 64 tokens, 4 heads on 2, 64 elements each.
    pub fn new(stage: Stage, pass: Pass, dtype: DType) -> Self {
        Self {
            stage,
            pass,
            dtype,
            seed: 0,
            query_lens: vec![64],
            kv_lens: vec![64],
            num_q_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            value_dim: 64,
            config: NsaConfig::default(),
            gates: GateLayout::PerRow,
            key_compression: CompressionKind::Mean,
            value_compression: CompressionKind::Mean,
            rope: RopeKind::None,
            softmax_scale: None,
            grad_lse: false,
            layout: ViewLayout::Contiguous,
            hostile: Hostile::None,
        }
    }

    /// The batch of its sequences.
    pub fn batch(&self) -> Result<Batch> {
        let sums = |lengths: &[usize]| {
            let mut sums = vec![0i32];
            let mut total = 0usize;
            for length in lengths {
                total = total.saturating_add(*length);
                sums.push(i32::try_from(total).unwrap_or(i32::MAX));
            }
            sums
        };
        Batch::from_cu_seqlens(&sums(&self.query_lens), &sums(&self.kv_lens))
    }

    /// Checks that the case can be built at all.
    pub fn validate(&self) -> Result<()> {
        self.batch()?;
        self.validate_config()?;
        if !self.dtype.is_float() {
            return Err(Error::input("dtype", "f32, bf16 or f16", self.dtype));
        }
        if self.num_kv_heads == 0 || self.num_q_heads == 0 || !self.num_q_heads.is_multiple_of(self.num_kv_heads) {
            let expected = format!("a positive multiple of hkv {}", self.num_kv_heads);
            return Err(Error::input("hq", expected, self.num_q_heads));
        }
        for (name, dim) in [("d", self.head_dim), ("dv", self.value_dim)] {
            if dim == 0 || dim > 256 || !dim.is_multiple_of(8) {
                return Err(Error::input(name, "a multiple of 8 up to 256", dim));
            }
        }
        let other = match (self.stage, self.pass) {
            (Stage::Index, _) => Some("a stage with an operation of its own"),
            (Stage::Select, Pass::Backward) => Some("select:forward, the selection has no gradient"),
            _ => None,
        };
        other.map_or(Ok(()), |expected| Err(Error::input("stage", expected, format!("{}:{}", self.stage, self.pass))))
    }

    /// Only what the stage reads: any number of blocks may be listed for `selected`, for example.
    fn validate_config(&self) -> Result<()> {
        let reads = |argument: &str| match argument {
            "topk" | "block_size" => matches!(self.stage, Stage::Select | Stage::Nsa),
            _ => true,
        };
        match self.config.validate() {
            Err(error) if error.argument().is_some_and(reads) => return Err(error),
            _ => {}
        }
        if self.stage == Stage::Selected && !BLOCK_SIZES.contains(&self.config.block_size) {
            return Err(Error::input("block", "one of 16, 32, 64, 128, 256", self.config.block_size));
        }
        Ok(())
    }

    /// Query heads that share one kv head.
    pub fn gqa_group_size(&self) -> usize {
        self.num_q_heads / self.num_kv_heads.max(1)
    }

    /// An estimate of the multiplications of a forward, by which the generator keeps cases small.
    pub fn cost(&self) -> usize {
        let (l, s) = (self.config.kernel_size, self.config.kernel_stride.max(1));
        let keys = |kv: usize| match self.stage {
            Stage::Compressed | Stage::Select => kv / s,
            Stage::Window => kv.min(self.config.window_size + 1),
            Stage::Selected => kv.min(self.config.topk * self.config.block_size),
            Stage::Nsa => {
                kv / s
                    + kv.min(self.config.window_size + 1)
                    + kv.min(self.config.topk.saturating_mul(self.config.block_size))
            }
            Stage::Dense => kv,
            // Not multiplications, but a handful of roundings and a cosine per element.
            Stage::Rope | Stage::Combine => 16,
            Stage::Compress | Stage::Index => 0,
        };
        let pairs: usize = self.query_lens.iter().zip(&self.kv_lens).map(|(q, kv)| q * keys(*kv)).sum();
        let attention = pairs * self.num_q_heads * (self.head_dim + self.value_dim);
        let windows: usize = self.kv_lens.iter().map(|kv| kv / s).sum();
        let compress = |kind: CompressionKind, dim: usize| match kind {
            CompressionKind::Mean | CompressionKind::Weighted => windows * l * dim,
            CompressionKind::Linear | CompressionKind::LinearPosition => (windows + 1) * l * dim * dim,
        };
        let compress = match self.stage {
            Stage::Compress => compress(self.key_compression, self.head_dim),
            Stage::Nsa => {
                compress(self.key_compression, self.head_dim) + compress(self.value_compression, self.value_dim)
            }
            _ => 0,
        };
        attention + compress * self.num_kv_heads
    }
}
