//! A small raster image with text, written as PNG.

use crate::failure::{Failure, Outcome};
use font8x8::legacy::BASIC_LEGACY;

/// Red, green, blue.
pub type Rgb = [u8; 3];

/// Side of a glyph in pixels, before scaling.
pub const GLYPH: usize = 8;

/// An image.
#[derive(Debug)]
pub struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<Rgb>,
}

impl Canvas {
    /// An image of one color.
    pub fn new(width: usize, height: usize, color: Rgb) -> Self {
        Self { width, height, pixels: vec![color; width * height] }
    }

    /// Sets one pixel; outside of the image nothing happens.
    pub fn set(&mut self, x: usize, y: usize, color: Rgb) {
        if x < self.width && y < self.height {
            self.pixels[y * self.width + x] = color;
        }
    }

    /// Fills a rectangle.
    pub fn fill(&mut self, [x, y]: [usize; 2], [width, height]: [usize; 2], color: Rgb) {
        for row in y..y + height {
            for column in x..x + width {
                self.set(column, row, color);
            }
        }
    }

    /// Draws the border of a rectangle, one pixel outside of it.
    pub fn frame(&mut self, [x, y]: [usize; 2], [width, height]: [usize; 2], color: Rgb) {
        self.fill([x - 1, y - 1], [width + 2, 1], color);
        self.fill([x - 1, y + height], [width + 2, 1], color);
        self.fill([x - 1, y - 1], [1, height + 2], color);
        self.fill([x + width, y - 1], [1, height + 2], color);
    }

    /// Writes text with its upper left corner at `x, y`. Characters outside of ASCII become `?`.
    pub fn text(&mut self, [x, y]: [usize; 2], text: &str, scale: usize, color: Rgb) {
        for (place, character) in text.chars().enumerate() {
            let glyph = BASIC_LEGACY[if character.is_ascii() { character as usize } else { '?' as usize }];
            for (row, bits) in glyph.iter().enumerate() {
                for column in (0..GLYPH).filter(|column| bits >> column & 1 == 1) {
                    let left = x + (place * GLYPH + column) * scale;
                    self.fill([left, y + row * scale], [scale, scale], color);
                }
            }
        }
    }

    /// Writes text upwards, with its lower left corner at `x, y` when the head is turned left.
    pub fn text_upwards(&mut self, [x, y]: [usize; 2], text: &str, scale: usize, color: Rgb) {
        let mut flat = Canvas::new(text_width(text, scale), GLYPH * scale, [255; 3]);
        flat.text([0, 0], text, scale, [0; 3]);
        for row in 0..flat.height {
            for column in 0..flat.width {
                if flat.pixels[row * flat.width + column] == [0; 3] && y >= column {
                    self.set(x + row, y - column, color);
                }
            }
        }
    }

    /// The image as a PNG file.
    pub fn png(&self) -> Outcome<Vec<u8>> {
        let failed = |error: png::EncodingError| Failure::Check(format!("the heat map cannot be encoded: {error}"));
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(self.pixels.as_flattened()).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }
}

/// Pixels that a text takes.
pub fn text_width(text: &str, scale: usize) -> usize {
    text.chars().count() * GLYPH * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_lands_where_it_should_and_the_png_decodes() {
        let mut canvas = Canvas::new(40, 20, [255; 3]);
        canvas.text([2, 3], "I", 2, [9, 8, 7]);
        let inked: Vec<usize> = (0..canvas.pixels.len()).filter(|place| canvas.pixels[*place] == [9, 8, 7]).collect();
        assert!(!inked.is_empty());
        assert!(inked.iter().all(|place| (2..18).contains(&(place % 40)) && (3..19).contains(&(place / 40))));
        let bytes = canvas.png().expect("encoded");
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().expect("header");
        let mut pixels = vec![0; reader.output_buffer_size().expect("size")];
        reader.next_frame(&mut pixels).expect("frame");
        assert_eq!(pixels, canvas.pixels.as_flattened());
    }
}
