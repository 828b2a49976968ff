//! Stage `select`: the top-k blocks of a row from its block scores.

use fsa_core::NsaConfig;

/// Best blocks so far, best last; among equal scores the lower id is better.
#[derive(Debug, Default)]
pub(crate) struct TopBlocks {
    best: Vec<(f32, u32)>,
}

impl TopBlocks {
    /// Writes the ids that a row with own block `own` lists: `init_blocks` first blocks, `local_blocks` last
    /// ones, then by descending score, ties to the lower id; ascending, left-packed, then -1.
    pub(crate) fn list(&mut self, scores: &[f32], own: usize, config: &NsaConfig, row: &mut [i32]) {
        let candidates = own + 1;
        let take = config.topk.min(candidates);
        let init = config.init_blocks.min(candidates);
        let local = candidates.saturating_sub(config.local_blocks).max(init);
        row.fill(-1);
        let scored = take - init - (candidates - local);
        self.best.clear();
        if scored > 0 {
            self.scan(&scores[..candidates], init..local, scored);
        }
        let forced = (0..init).chain(local..candidates).map(|id| id as i32);
        let chosen = self.best.iter().map(|(_, id)| *id as i32);
        for (slot, id) in row.iter_mut().zip(forced.chain(chosen)) {
            *slot = id;
        }
        row[..take].sort_unstable();
    }

    /// Keeps the `count` best of `range`. Most blocks fall below the worst kept one and cost one comparison;
    /// ids come in ascending order, so a tie never displaces a kept block.
    fn scan(&mut self, scores: &[f32], range: std::ops::Range<usize>, count: usize) {
        let mut worst = f32::NEG_INFINITY;
        for (group, chunk) in scores[range.clone()].chunks(16).enumerate() {
            let full = self.best.len() == count;
            if full && chunk.iter().all(|score| *score <= worst) {
                continue;
            }
            for (k, score) in chunk.iter().enumerate() {
                let id = (range.start + group * 16 + k) as u32;
                if self.best.len() == count {
                    if *score <= worst || score.is_nan() {
                        continue;
                    }
                    self.best.remove(0);
                }
                let place = self.best.iter().position(|(kept, _)| score <= kept).unwrap_or(self.best.len());
                self.best.insert(place, (*score, id));
                worst = self.best[0].0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(scores: &[f32], config: &NsaConfig) -> Vec<i32> {
        let mut row = vec![7; config.topk];
        TopBlocks::default().list(scores, scores.len() - 1, config, &mut row);
        row
    }

    #[test]
    fn forced_blocks_come_first_and_ties_go_to_the_lower_id() {
        let config = NsaConfig { topk: 5, ..NsaConfig::default() };
        assert_eq!(list(&[0.0, 0.5, 0.1, 0.5, 0.5, 0.2, 0.0, 0.0], &config), [0, 1, 3, 6, 7]);
        assert_eq!(list(&[0.0; 9], &config), [0, 1, 2, 7, 8]);
        assert_eq!(list(&[0.0; 3], &config), [0, 1, 2, -1, -1]);
        assert_eq!(list(&[0.0; 1], &config), [0, -1, -1, -1, -1]);
        let free = NsaConfig { topk: 2, init_blocks: 0, local_blocks: 0, ..config };
        assert_eq!(list(&[0.1, 0.4, 0.2, 0.4, 0.4], &free), [1, 3]);
    }

    #[test]
    fn the_scan_equals_a_sort() {
        let config = NsaConfig { topk: 9, ..NsaConfig::default() };
        for seed in 0..200u64 {
            let n = 1 + (seed as usize * 7) % 150;
            let score = |i: usize| ((i as u64 * 2_654_435_761 + seed * 97) % 23) as f32;
            let scores: Vec<f32> = (0..n).map(score).collect();
            let mut order: Vec<usize> = (1..n.saturating_sub(2)).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
            let mut expected: Vec<i32> = [0, n as i32 - 2, n as i32 - 1].into_iter().filter(|id| *id >= 0).collect();
            expected.dedup();
            expected.extend(order.iter().map(|id| *id as i32).take(6));
            expected.sort_unstable();
            expected.dedup();
            expected.resize(9, -1);
            assert_eq!(list(&scores, &config), expected, "{scores:?}");
        }
    }
}
