//! Reads attention outputs as predictions of the next byte.

use super::codes::{Coded, HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS};
use fsa::Tensor;

/// For every row but the last, the byte whose value codes agree best with the output, summed over the heads.
pub fn next_bytes(coded: &Coded, text: &[u8], out: &Tensor) -> fsa::Result<Vec<u8>> {
    let out: Vec<f32> = out.view().to_f64().into_iter().map(|element| element as f32).collect();
    let codes: Vec<_> = (0..NUM_KV_HEADS).map(|kv_head| coded.byte_codes(kv_head)).collect();
    let mut present = [false; 256];
    text.iter().for_each(|byte| present[usize::from(*byte)] = true);
    let candidates: Vec<u8> = (0..=255).filter(|byte| present[usize::from(*byte)]).collect();
    let rows = out.chunks_exact(NUM_Q_HEADS * HEAD_DIM).take(text.len().saturating_sub(1));
    Ok(rows.map(|row| best_byte(row, &codes, &candidates)).collect())
}

fn best_byte(row: &[f32], codes: &[Vec<[f32; HEAD_DIM]>], candidates: &[u8]) -> u8 {
    // All heads of a group read values with the same codes, so their outputs can be added first.
    let group = NUM_Q_HEADS / NUM_KV_HEADS;
    let mut sums = [[0.0f32; HEAD_DIM]; NUM_KV_HEADS];
    for (head, out) in row.chunks_exact(HEAD_DIM).enumerate() {
        for (sum, element) in sums[head / group].iter_mut().zip(out) {
            *sum += element;
        }
    }
    let votes = |byte: u8| -> f32 {
        let dot = |(sum, codes): (&[f32; HEAD_DIM], &Vec<[f32; HEAD_DIM]>)| -> f32 {
            sum.iter().zip(&codes[usize::from(byte)]).map(|(a, b)| a * b).sum()
        };
        sums.iter().zip(codes).map(dot).sum()
    };
    let mut best = (f32::NEG_INFINITY, 0);
    for byte in candidates {
        let vote = votes(*byte);
        if vote > best.0 {
            best = (vote, *byte);
        }
    }
    best.1
}

/// Share of right predictions.
pub fn accuracy(predicted: &[u8], text: &[u8]) -> f64 {
    let right = predicted.iter().zip(&text[1..]).filter(|(guess, byte)| guess == byte).count();
    right as f64 / predicted.len().max(1) as f64
}

/// Share of the dense attention mass that a subset of the keys holds: `exp(lse of the subset - lse of all)`,
/// averaged over rows and heads.
pub fn mass(subset_lse: &Tensor, dense_lse: &Tensor) -> fsa::Result<f64> {
    let (subset, dense) = (subset_lse.as_slice::<f32>("lse")?, dense_lse.as_slice::<f32>("lse")?);
    let total: f64 = subset.iter().zip(dense).map(|(part, all)| f64::from(part - all).exp()).sum();
    Ok(total / dense.len().max(1) as f64)
}

/// A row that the selection gets right and the window alone does not, with the passage that it found.
#[derive(Debug, serde::Serialize)]
pub struct Example {
    /// The row.
    pub row: usize,
    /// The bytes up to and including the row.
    pub context: String,
    /// The byte that follows.
    pub next: String,
    /// What the window alone predicts.
    pub window_predicts: String,
    /// The kv head whose selection holds the passage.
    pub kv_head: usize,
    /// The chosen block.
    pub block: usize,
    /// The earlier passage that ends with the same bytes, and its next byte.
    pub passage: String,
}

/// Searches the later half of the text for an instructive row: the longest context that recurs in a chosen
/// block, far outside of the window.
pub fn example(
    text: &[u8],
    predicted: [&[u8]; 2],
    topk_indices: &Tensor,
    block_size: usize,
) -> fsa::Result<Option<Example>> {
    let [nsa, window] = predicted;
    let ids = topk_indices.as_slice::<i32>("topk_indices")?;
    let topk = topk_indices.shape()[2];
    let mut best: Option<(usize, Example)> = None;
    for row in text.len() / 2..nsa.len() {
        if nsa[row] != text[row + 1] || window[row] == text[row + 1] {
            continue;
        }
        for kv_head in 0..NUM_KV_HEADS {
            let list = &ids[(kv_head * text.len() + row) * topk..][..topk];
            for block in list.iter().filter_map(|id| usize::try_from(*id).ok()) {
                for end in block * block_size..((block + 1) * block_size).min(row.saturating_sub(4096)) {
                    let common = (0..=end.min(row)).take(24).take_while(|k| text[end - k] == text[row - k]).count();
                    // Beyond 20 bytes a repeated line says more about the text than about the selection.
                    if common > best.as_ref().map_or(5, |(length, _)| *length)
                        && common <= 20
                        && text[end + 1] == text[row + 1]
                    {
                        best = Some((common, describe(text, row, end, kv_head, block, window[row])));
                    }
                }
            }
        }
    }
    Ok(best.map(|(_, example)| example))
}

fn describe(text: &[u8], row: usize, end: usize, kv_head: usize, block: usize, window: u8) -> Example {
    let excerpt = |end: usize| readable(&text[(end + 1).saturating_sub(32)..=end]);
    Example {
        row,
        context: excerpt(row),
        next: readable(&text[row + 1..row + 2]),
        window_predicts: readable(&[window]),
        kv_head,
        block,
        passage: excerpt(end + 1),
    }
}

/// Bytes as text on one line.
fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() { '·' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsa::{DType, NsaConfig};

    #[test]
    fn the_code_of_a_byte_reads_as_that_byte() {
        let text = b"hello, world";
        let coded = Coded::new(text, &NsaConfig::default(), 3, DType::F32).expect("coded");
        let mut out = vec![0.0f32; text.len() * NUM_Q_HEADS * HEAD_DIM];
        for (place, element) in out.iter_mut().enumerate() {
            let (row, head, dim) = (place / HEAD_DIM / NUM_Q_HEADS, place / HEAD_DIM % NUM_Q_HEADS, place % HEAD_DIM);
            let next = text[(row + 1) % text.len()];
            *element = coded.byte_codes(head * NUM_KV_HEADS / NUM_Q_HEADS)[usize::from(next)][dim];
        }
        let out = Tensor::new("out", out, &[text.len(), NUM_Q_HEADS, HEAD_DIM]).expect("shape");
        let predicted = next_bytes(&coded, text, &out).expect("f32");
        assert_eq!(predicted, text[1..]);
        assert_eq!(accuracy(&predicted, text), 1.0);
    }
}
