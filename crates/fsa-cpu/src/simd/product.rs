//! The small matrix product under every stage: `out (+)= left . right`.
//!
//! `right` and `out` are row-major with padded rows; `left` is row-major or column-major, because
//! the gradients of keys and values need the transposed probabilities. Six rows by four 512-bit registers
//! of accumulators (24 of 32; two by 256 bits: 12 of 16) keep the multipliers busy: per step of the
//! depth 4 vector loads and 6 broadcasts feed 24 multiply-adds. Operands are small (one tile) and stay in
//! the first two cache levels, so there is no further blocking and nothing is copied.

use super::Isa;
use pulp::{Simd, WithSimd};

/// Rows of the register tile.
const ROWS: usize = 6;

/// Left operand, `[rows, depth]`.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a> {
    /// Element (r, k) at `r * stride + k`.
    Rows { data: &'a [f32], stride: usize },
    /// Element (r, k) at `k * stride + r`.
    Columns { data: &'a [f32], stride: usize },
}

/// One product of row-major operands, each with the distance between its rows.
pub(crate) struct Product<'a> {
    /// `[rows, depth]`.
    pub left: Left<'a>,
    /// `[depth, columns]`.
    pub right: (&'a [f32], usize),
    /// `[rows, columns]`.
    pub out: (&'a mut [f32], usize),
    /// Rows, depth and columns; the columns are a multiple of [`fsa_core::plan::VECTOR`].
    pub size: [usize; 3],
    /// Add to `out` instead of overwriting it.
    pub accumulate: bool,
}

impl Product<'_> {
    /// Computes the product.
    pub(crate) fn run(self, isa: Isa) {
        debug_assert!(self.size[2].is_multiple_of(fsa_core::plan::VECTOR));
        isa.run(self);
    }
}

impl WithSimd for Product<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let lanes = S::F32_LANES;
        let widest = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        let mut column = 0;
        while column < self.size[2] {
            let vectors = ((self.size[2] - column) / lanes).min(widest);
            match vectors {
                4 => column_strip::<S, 4>(simd, &mut self, column),
                3 => column_strip::<S, 3>(simd, &mut self, column),
                2 => column_strip::<S, 2>(simd, &mut self, column),
                _ => column_strip::<S, 1>(simd, &mut self, column),
            }
            column += vectors.max(1) * lanes;
        }
    }
}

#[inline(always)]
fn column_strip<S: Simd, const V: usize>(simd: S, p: &mut Product<'_>, column: usize) {
    let mut row = 0;
    while row + ROWS <= p.size[0] {
        register_tile::<S, ROWS, V>(simd, p, row, column);
        row += ROWS;
    }
    match p.size[0] - row {
        5 => register_tile::<S, 5, V>(simd, p, row, column),
        4 => register_tile::<S, 4, V>(simd, p, row, column),
        3 => register_tile::<S, 3, V>(simd, p, row, column),
        2 => register_tile::<S, 2, V>(simd, p, row, column),
        1 => register_tile::<S, 1, V>(simd, p, row, column),
        _ => {}
    }
}

/// `R` rows by `V` vectors of the output.
#[inline(always)]
fn register_tile<S: Simd, const R: usize, const V: usize>(simd: S, p: &mut Product<'_>, row: usize, column: usize) {
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    let (depth, (right, stride)) = (p.size[1], p.right);
    let right = &right[column..];
    match p.left {
        Left::Rows { data, stride: left_stride } => {
            let mut rows = [&data[..0]; R];
            for (r, slice) in rows.iter_mut().enumerate() {
                *slice = &data[(row + r) * left_stride..][..depth];
            }
            for k in 0..depth {
                let b = load::<S, V>(simd, &right[k * stride..]);
                for r in 0..R {
                    multiply_add(simd, &mut sums[r], rows[r][k], &b);
                }
            }
        }
        Left::Columns { data, stride: left_stride } => {
            for k in 0..depth {
                let b = load::<S, V>(simd, &right[k * stride..]);
                let a = &data[k * left_stride + row..][..R];
                for r in 0..R {
                    multiply_add(simd, &mut sums[r], a[r], &b);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let (out, stride) = &mut p.out;
        let out = &mut out[(row + r) * *stride + column..][..V * S::F32_LANES];
        let (out, _) = S::as_mut_simd_f32s(out);
        for v in 0..V {
            out[v] = if p.accumulate { simd.add_f32s(out[v], sums[v]) } else { sums[v] };
        }
    }
}

#[inline(always)]
fn load<S: Simd, const V: usize>(simd: S, row: &[f32]) -> [S::f32s; V] {
    let (row, _) = S::as_simd_f32s(&row[..V * S::F32_LANES]);
    let mut vectors = [simd.splat_f32s(0.0); V];
    vectors.copy_from_slice(&row[..V]);
    vectors
}

#[inline(always)]
fn multiply_add<S: Simd, const V: usize>(simd: S, sums: &mut [S::f32s; V], a: f32, b: &[S::f32s; V]) {
    let a = simd.splat_f32s(a);
    for v in 0..V {
        sums[v] = simd.mul_add_e_f32s(a, b[v], sums[v]);
    }
}
