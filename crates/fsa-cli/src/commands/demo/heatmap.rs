//! The heat map of a selection: query rows against chosen blocks, one panel per kv head.

use super::canvas::{Canvas, GLYPH, Rgb, text_width};
use crate::failure::Outcome;
use fsa::Tensor;

/// What the panels show.
#[derive(Debug)]
pub struct Heatmap<'a> {
    /// `[num_kv_heads, total_q, topk]`.
    pub topk_indices: &'a Tensor,
    /// Keys in a block.
    pub block_size: usize,
    /// Line above the panels.
    pub title: String,
    /// One per kv head.
    pub panel_titles: Vec<String>,
}

const PANEL: usize = 620;
const LEFT: usize = 96;
const TOP: usize = 84;
const GAP: usize = 120;
const BOTTOM: usize = 64;
const LEGEND: usize = 150;
const INK: Rgb = [30, 34, 40];
const PAPER: Rgb = [255, 255, 255];
/// Blocks in the future of a row.
const FUTURE: Rgb = [232, 232, 236];
/// Colors of shares 0, 1/4, .. 1: dark for many, so that sparse choices stay visible on white.
const SCALE: [Rgb; 5] = [[255, 255, 255], [253, 190, 110], [233, 92, 71], [146, 30, 98], [32, 12, 74]];

impl Heatmap<'_> {
    /// Draws the map as a PNG file.
    pub fn png(&self) -> Outcome<Vec<u8>> {
        let heads = self.panel_titles.len();
        let width = LEFT + heads * PANEL + (heads - 1) * GAP + LEGEND;
        let mut canvas = Canvas::new(width, TOP + PANEL + BOTTOM, PAPER);
        canvas.text([LEFT, 18], &self.title, 2, INK);
        for (head, title) in self.panel_titles.iter().enumerate() {
            let corner = [LEFT + head * (PANEL + GAP), TOP];
            canvas.text([corner[0], TOP - 28], title, 2, INK);
            self.panel(&mut canvas, head, corner)?;
            self.axes(&mut canvas, corner);
        }
        legend(&mut canvas, [width - LEGEND + 40, TOP]);
        canvas.png()
    }

    fn rows(&self) -> usize {
        self.topk_indices.shape()[1]
    }

    fn blocks(&self) -> usize {
        self.rows().div_ceil(self.block_size)
    }

    /// One pixel is a range of rows and a range of blocks; its color is the share of (row, block) pairs chosen,
    /// at least the color of 8 % if any was, so that no choice disappears.
    fn panel(&self, canvas: &mut Canvas, head: usize, [x, y]: [usize; 2]) -> Outcome {
        let ids = self.topk_indices.as_slice::<i32>("topk_indices")?;
        let (rows, blocks, topk) = (self.rows(), self.blocks(), self.topk_indices.shape()[2]);
        let pixel_rows = PANEL.min(rows);
        let mut counts = vec![0u32; blocks];
        for pixel in 0..pixel_rows {
            let range = pixel * rows / pixel_rows..(pixel + 1) * rows / pixel_rows;
            counts.fill(0);
            for row in range.clone() {
                let list = &ids[(head * rows + row) * topk..][..topk];
                for id in list.iter().filter_map(|id| usize::try_from(*id).ok()) {
                    counts[id] += 1;
                }
            }
            let future = (range.end.max(1) - 1) / self.block_size + 1;
            let lines = pixel * PANEL / pixel_rows..(pixel + 1) * PANEL / pixel_rows;
            for column in 0..PANEL {
                let first = column * blocks / PANEL;
                let last = ((column + 1) * blocks / PANEL).max(first + 1);
                let chosen: u32 = counts[first..last].iter().sum();
                let share = f64::from(chosen) / (range.len() * (last - first)).max(1) as f64;
                let color = if first >= future {
                    FUTURE
                } else if chosen > 0 {
                    color_of(share.max(0.08))
                } else {
                    PAPER
                };
                canvas.fill([x + column, y + lines.start], [1, lines.len()], color);
            }
        }
        Ok(())
    }

    fn axes(&self, canvas: &mut Canvas, [x, y]: [usize; 2]) {
        canvas.frame([x, y], [PANEL, PANEL], INK);
        for block in ticks(self.blocks()) {
            let place = x + block * PANEL / self.blocks();
            let label = block.to_string();
            canvas.fill([place, y + PANEL + 1], [1, 6], INK);
            let left = place.saturating_sub(text_width(&label, 1) / 2);
            canvas.text([left, y + PANEL + 11], &label, 1, INK);
        }
        for row in ticks(self.rows()) {
            let place = y + row * PANEL / self.rows();
            let label = row.to_string();
            canvas.fill([x - 7, place], [6, 1], INK);
            let left = x.saturating_sub(12 + text_width(&label, 1));
            canvas.text([left, place.saturating_sub(GLYPH / 2)], &label, 1, INK);
        }
        let name = format!("block of {} keys", self.block_size);
        canvas.text([x + (PANEL - text_width(&name, 2)) / 2, y + PANEL + 32], &name, 2, INK);
        let name = "query row";
        canvas.text_upwards([x - 82, y + (PANEL + text_width(name, 2)) / 2], name, 2, INK);
    }
}

/// About six round numbers from 0 below `end`.
fn ticks(end: usize) -> impl Iterator<Item = usize> {
    let rough = end.div_ceil(6).max(1);
    let mut step = 1;
    while step * 10 <= rough {
        step *= 10;
    }
    let step = [1, 2, 5, 10].into_iter().map(|factor| factor * step).find(|step| *step >= rough).unwrap_or(step);
    (0..end).step_by(step)
}

fn color_of(share: f64) -> Rgb {
    let place = share.clamp(0.0, 1.0) * (SCALE.len() - 1) as f64;
    let low = (place as usize).min(SCALE.len() - 2);
    let part = place - low as f64;
    std::array::from_fn(|c| (f64::from(SCALE[low][c]) * (1.0 - part) + f64::from(SCALE[low + 1][c]) * part) as u8)
}

fn legend(canvas: &mut Canvas, [x, y]: [usize; 2]) {
    const HEIGHT: usize = 240;
    for line in 0..HEIGHT {
        let share = 1.0 - line as f64 / (HEIGHT - 1) as f64;
        canvas.fill([x, y + 40 + line], [20, 1], color_of(share));
    }
    canvas.frame([x, y + 40], [20, HEIGHT], INK);
    for (label, line) in [("100 %", 0), ("50 %", HEIGHT / 2), ("0 %", HEIGHT - 1)] {
        canvas.fill([x + 21, y + 40 + line], [4, 1], INK);
        canvas.text([x + 30, y + 37 + line], label, 1, INK);
    }
    canvas.text([x, y], "rows that", 1, INK);
    canvas.text([x, y + 12], "chose it", 1, INK);
    canvas.fill([x, y + 300], [20, 20], FUTURE);
    canvas.frame([x, y + 300], [20, 20], INK);
    canvas.text([x + 30, y + 306], "future", 1, INK);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks(622).collect::<Vec<_>>(), [0, 200, 400, 600]);
        assert_eq!(ticks(39_778).count(), 4);
        assert_eq!(ticks(3).collect::<Vec<_>>(), [0, 1, 2]);
        assert!((1..2000).all(|end| (1..=6).contains(&ticks(end).count())));
    }

    #[test]
    fn any_selection_has_a_picture() {
        for (rows, topk) in [(1, 1), (100, 3), (2000, 4)] {
            let ids: Vec<i32> = (0..rows * topk).map(|i| (i % topk) as i32 - 1).map(|id| id.min(0)).collect();
            let topk_indices = Tensor::new("topk_indices", ids, &[1, rows, topk]).expect("shape");
            let map = Heatmap {
                topk_indices: &topk_indices,
                block_size: 16,
                title: "title".into(),
                panel_titles: vec!["kv head 0".into()],
            };
            assert!(map.png().expect("drawn").len() > 1000);
        }
    }
}
