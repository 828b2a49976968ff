//! Queries, keys and values of a text, made from its bytes without any training.
//!
//! One token is one byte. Every n-gram has a code: a hash of its bytes, read as a vector of signs.
//! The codes of different n-grams are nearly orthogonal.
//!
//! - The context before a byte is the sum of the codes of the n-grams that end there, 1 byte earlier, 2 bytes
//!   earlier, .. with weights `1, decay, decay^2, ..`. Two places with the same recent bytes have nearly the
//!   same context vector; the longer the common past, the larger the product.
//! - `key[i]` is the context that ends **before** byte i, and `value[i]` is the code of byte i. So a key says
//!   "after this came that", and the key of a row's own position leaks nothing.
//! - `query[p]` is the context that ends **with** byte p: it looks for earlier places with the same recent bytes.
//!   What it finds is followed by what byte p + 1 probably is.
//!
//! The heads of a group differ in how fast their queries forget; a head that forgets slowly prefers blocks
//! that share the topic, one that forgets fast the exact match.
//!
//! Selection has to find the block of a match through compressed keys: sums of 32 keys, in which the match is one
//! term and the other 31 are noise. The overlap of neighbouring contexts is what lifts it out: where the past
//! agrees over several bytes, several keys of the same window agree with the query. A gain of 4 on the
//! compressed keys (`weighted` compression, 4 / kernel_size each) makes their softmax sharper than a mean would.

use crate::random::mix;
use fsa::{Batch, Compression, DType, NsaConfig, Tensor};

/// Query heads.
pub const NUM_Q_HEADS: usize = 8;
/// Key and value heads, each with codes of its own.
pub const NUM_KV_HEADS: usize = 2;
/// Elements of a vector: the bits of one hash.
pub const HEAD_DIM: usize = 64;
/// Bytes of the n-grams of each kv head, and how its keys forget.
pub const NGRAMS: [(usize, f32); NUM_KV_HEADS] = [(2, 0.7), (3, 0.6)];
/// How the queries of each head of a group forget.
const QUERY_DECAYS: [f32; NUM_Q_HEADS / NUM_KV_HEADS] = [0.4, 0.5, 0.6, 0.7];
/// Logit of a perfect match. Noise has a standard deviation of 1/8 of it: large enough that a match outweighs
/// the noise of 40,000 keys, exp(20) against 40,000 * exp(2.5^2 / 2).
const MATCH_LOGIT: f32 = 20.0;
/// Gain of the compressed keys over a mean.
const COMPRESSED_GAIN: f32 = 4.0;
/// Weights of the compressed, selected and window branch, for every row. A compressed value is the mean of 32
/// bytes and says little about the next one.
pub const GATES: [f32; 3] = [0.05, 0.65, 0.3];

/// The tensors of a text.
#[derive(Debug)]
pub struct Coded {
    /// `[tokens, NUM_Q_HEADS, HEAD_DIM]`.
    pub query: Tensor,
    /// `[tokens, NUM_KV_HEADS, HEAD_DIM]`.
    pub key: Tensor,
    /// `[tokens, NUM_KV_HEADS, HEAD_DIM]`.
    pub value: Tensor,
    /// `[tokens, 3]`.
    pub gates: Tensor,
    /// `[NUM_KV_HEADS, kernel_size]`.
    pub key_weight: Tensor,
    /// One sequence.
    pub batch: Batch,
    seed: u64,
}

/// Sign `dim` of the code of a hash.
fn sign(hash: u64, dim: usize) -> f32 {
    if hash >> dim & 1 == 1 { 1.0 } else { -1.0 }
}

/// Hash of the `n` bytes that end with byte `end`; bytes before the text count as none.
fn ngram(text: &[u8], end: usize, n: usize, seed: u64) -> u64 {
    let bytes = text[(end + 1).saturating_sub(n)..=end].iter();
    bytes.fold(mix(seed ^ n as u64), |hash, byte| mix(hash ^ u64::from(*byte)))
}

/// Hash of the code that stands for `byte` in the values of a kv head.
pub fn byte_code(byte: u8, kv_head: usize, seed: u64) -> [f32; HEAD_DIM] {
    let hash = mix(mix(seed ^ 0x76_616c_7565) ^ ((kv_head as u64) << 8 | u64::from(byte)));
    std::array::from_fn(|dim| sign(hash, dim))
}

/// Calls `visit` with the context vector after every byte: sums of codes that forget by `decay`, with unit weight
/// in the root of the sum of squares.
fn contexts(hashes: &[u64], decay: f32, mut visit: impl FnMut(usize, &[f32; HEAD_DIM])) {
    let norm = (1.0 - decay * decay).sqrt();
    let mut state = [0.0f32; HEAD_DIM];
    for (i, hash) in hashes.iter().enumerate() {
        for (dim, element) in state.iter_mut().enumerate() {
            *element = decay * *element + norm * sign(*hash, dim);
        }
        visit(i, &state);
    }
}

impl Coded {
    /// Codes `text`, one token per byte, in tensors of `dtype`.
    pub fn new(text: &[u8], config: &NsaConfig, seed: u64, dtype: DType) -> fsa::Result<Self> {
        let tokens = text.len();
        let mut query = vec![0.0f32; tokens * NUM_Q_HEADS * HEAD_DIM];
        let mut key = vec![0.0f32; tokens * NUM_KV_HEADS * HEAD_DIM];
        let mut value = vec![0.0f32; tokens * NUM_KV_HEADS * HEAD_DIM];
        // The logits are divided by sqrt(head_dim); vectors of signs have a product of head_dim.
        let sharpness = MATCH_LOGIT / (HEAD_DIM as f32).sqrt();
        let group = NUM_Q_HEADS / NUM_KV_HEADS;
        for (kv_head, (n, decay)) in NGRAMS.into_iter().enumerate() {
            let codes = |i| ngram(text, i, n, mix(seed ^ ((kv_head as u64) << 32)));
            let hashes: Vec<u64> = (0..tokens).map(codes).collect();
            let place = |i: usize| (i * NUM_KV_HEADS + kv_head) * HEAD_DIM;
            contexts(&hashes, decay, |i, context| {
                if i + 1 < tokens {
                    key[place(i + 1)..][..HEAD_DIM].copy_from_slice(context);
                }
            });
            let bytes: Vec<_> = (0..=255).map(|byte| byte_code(byte, kv_head, seed)).collect();
            for (i, byte) in text.iter().enumerate() {
                value[place(i)..][..HEAD_DIM].copy_from_slice(&bytes[usize::from(*byte)]);
            }
            for (member, decay) in QUERY_DECAYS.into_iter().enumerate() {
                contexts(&hashes, decay, |p, context| {
                    let place = (p * NUM_Q_HEADS + kv_head * group + member) * HEAD_DIM;
                    for (q, c) in query[place..][..HEAD_DIM].iter_mut().zip(context) {
                        *q = sharpness * c;
                    }
                });
            }
        }
        let weight = COMPRESSED_GAIN / config.kernel_size as f32;
        let weights = vec![weight; NUM_KV_HEADS * config.kernel_size];
        Ok(Self {
            query: Tensor::from_f32("query", &query, dtype, &[tokens, NUM_Q_HEADS, HEAD_DIM])?,
            key: Tensor::from_f32("key", &key, dtype, &[tokens, NUM_KV_HEADS, HEAD_DIM])?,
            value: Tensor::from_f32("value", &value, dtype, &[tokens, NUM_KV_HEADS, HEAD_DIM])?,
            gates: Tensor::from_f32("gates", &GATES.repeat(tokens), dtype, &[tokens, 3])?,
            key_weight: Tensor::from_f32("key_weight", &weights, dtype, &[NUM_KV_HEADS, config.kernel_size])?,
            batch: Batch::single(tokens),
            seed,
        })
    }

    /// The arguments of the whole operation.
    pub fn args<'a>(&'a self, config: &'a NsaConfig) -> fsa::NsaArgs<'a> {
        fsa::NsaArgs {
            query: self.query.view(),
            key: self.key.view(),
            value: self.value.view(),
            gates: self.gates.view(),
            batch: &self.batch,
            config,
            key_compression: Compression::Weighted { weight: self.key_weight.view() },
            value_compression: Compression::Mean,
            rope: None,
            softmax_scale: None,
        }
    }

    /// The codes of all bytes in the values of a kv head.
    pub fn byte_codes(&self, kv_head: usize) -> Vec<[f32; HEAD_DIM]> {
        (0..=255).map(|byte| byte_code(byte, kv_head, self.seed)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_says_nothing_about_its_own_byte() {
        let config = NsaConfig::default();
        let (one, other) =
            (Coded::new(b"abcdefgh", &config, 1, DType::F32), Coded::new(b"abcdefgX", &config, 1, DType::F32));
        let (one, other) = (one.expect("coded"), other.expect("coded"));
        assert_eq!(one.key, other.key);
        assert_ne!(one.value, other.value);
        let last = 7 * NUM_Q_HEADS * HEAD_DIM;
        let (a, b) = (one.query.as_slice::<f32>("query"), other.query.as_slice::<f32>("query"));
        let (a, b) = (a.expect("f32"), b.expect("f32"));
        assert!(a[..last] == b[..last] && a[last..] != b[last..]);
    }

    #[test]
    fn the_same_past_has_the_largest_product() {
        let text = b"..the same words, other words; the same wor";
        let config = NsaConfig::default();
        let coded = Coded::new(text, &config, 7, DType::F32).expect("coded");
        let query = coded.query.as_slice::<f32>("query").expect("f32");
        let key = coded.key.as_slice::<f32>("key").expect("f32");
        let p = text.len() - 1;
        let product = |i: usize| -> f32 {
            let (q, k) = (&query[p * NUM_Q_HEADS * HEAD_DIM..], &key[i * NUM_KV_HEADS * HEAD_DIM..]);
            q[..HEAD_DIM].iter().zip(k).map(|(a, b)| a * b).sum()
        };
        let best = (0..p).max_by(|a, b| product(*a).total_cmp(&product(*b))).expect("not empty");
        assert_eq!(text[best], b'd', "the byte after the earlier `the same wor`");
    }
}
