//! Operations on single padded rows: scaling, sums, dot products, merging, transposition.

use super::Isa;
use pulp::{Simd, WithSimd};

/// Defines a kernel as a struct of its arguments and a function that dispatches it.
macro_rules! kernel {
    ($(#[$doc:meta])* fn $name:ident / $op:ident($($arg:ident: $type:ty),*) $(-> $output:ty)? |$simd:ident| $body:block) => {
        struct $op<'a> { $($arg: $type),* }
        impl<'a> WithSimd for $op<'a> {
            type Output = kernel!(@output $($output)?);
            #[inline(always)]
            fn with_simd<S: Simd>(self, $simd: S) -> Self::Output {
                let Self { $($arg),* } = self;
                $body
            }
        }
        $(#[$doc])*
        pub(crate) fn $name<'a>(isa: Isa, $($arg: $type),*) -> kernel!(@output $($output)?) {
            isa.run($op { $($arg),* })
        }
    };
    (@output) => { () };
    (@output $output:ty) => { $output };
}

kernel! {
    /// `values *= factor`.
    fn scale / Scale(values: &'a mut [f32], factor: f32) |simd| {
        let f = simd.splat_f32s(factor);
        let (vectors, tail) = S::as_mut_simd_f32s(values);
        for v in vectors {
            *v = simd.mul_f32s(*v, f);
        }
        for v in tail {
            *v *= factor;
        }
    }
}

kernel! {
    /// `target += factor * source`.
    fn add / Add(target: &'a mut [f32], source: &'a [f32], factor: f32) |simd| {
        let f = simd.splat_f32s(factor);
        let (targets, tail) = S::as_mut_simd_f32s(target);
        let (sources, source_tail) = S::as_simd_f32s(source);
        for (t, s) in targets.iter_mut().zip(sources) {
            *t = simd.mul_add_e_f32s(*s, f, *t);
        }
        for (t, s) in tail.iter_mut().zip(source_tail) {
            *t += s * factor;
        }
    }
}

kernel! {
    /// `target = target * keep + source * take`: one step of a merge by log-sum-exp.
    fn merge_row / MergeRow(target: &'a mut [f32], source: &'a [f32], keep: f32, take: f32) |simd| {
        let (keep, take) = (simd.splat_f32s(keep), simd.splat_f32s(take));
        let (targets, _) = S::as_mut_simd_f32s(target);
        let (sources, _) = S::as_simd_f32s(source);
        for (t, s) in targets.iter_mut().zip(sources) {
            *t = simd.mul_add_e_f32s(*s, take, simd.mul_f32s(*t, keep));
        }
    }
}

kernel! {
    /// Dot product of two padded rows.
    fn dot / Dot(a: &'a [f32], b: &'a [f32]) -> f32 |simd| {
        let (a, _) = S::as_simd_f32s(a);
        let (b, _) = S::as_simd_f32s(b);
        let mut sum = simd.splat_f32s(0.0);
        for (a, b) in a.iter().zip(b) {
            sum = simd.mul_add_e_f32s(*a, *b, sum);
        }
        simd.reduce_sum_f32s(sum)
    }
}

kernel! {
    /// True if no element is NaN or infinite.
    fn all_finite / AllFinite(values: &'a [f32]) -> bool |simd| {
        // x * 0 is 0 for a finite x and NaN otherwise; a NaN stays in the sum.
        let zero = simd.splat_f32s(0.0);
        let (vectors, tail) = S::as_simd_f32s(values);
        let mut sum = zero;
        for v in vectors {
            sum = simd.mul_add_e_f32s(*v, zero, sum);
        }
        simd.reduce_sum_f32s(sum) == 0.0 && tail.iter().all(|v| v.is_finite())
    }
}

kernel! {
    /// `target[c, r] = source[r, c]` for `rows` rows; `source` rows lie at multiples of `from`,
    /// `target` rows at multiples of `to`; `columns` rows of the target are written.
    fn transpose / Transpose(
        target: &'a mut [f32], to: usize, source: &'a [f32], from: usize, rows: usize, columns: usize
    ) |_simd| {
        // Eight by eight, so that both sides are read and written by whole cache lines; the
        // compiler turns the inner loops into shuffles under the dispatched instruction set.
        for column in (0..columns).step_by(8) {
            for row in (0..rows).step_by(8) {
                for c in column..(column + 8).min(columns) {
                    let height = 8.min(rows - row);
                    let line = &mut target[c * to + row..][..height];
                    for (r, t) in line.iter_mut().enumerate() {
                        *t = source[(row + r) * from + c];
                    }
                }
            }
        }
    }
}

kernel! {
    /// Adds to `target[j]` the sums of `u[i] = p[i] + p[i - 1] + .. + p[i - reach]` over the `steps` values
    /// of each block; `phase` values of block 0 lie before `u[0]`. `u` (`p.len() + reach` long) is scratch.
    /// What falls behind the last block of `target` belongs to the future and is dropped.
    fn sum_windows / SumWindows(
        u: &'a mut [f32], p: &'a [f32], reach: usize, phase: usize, steps: usize, target: &'a mut [f32]
    ) |_simd| {
        u[..p.len()].copy_from_slice(p);
        u[p.len()..].fill(0.0);
        for n in 1..=reach {
            for (u, p) in u[n..].iter_mut().zip(p) {
                *u += *p;
            }
        }
        let head = (steps - phase).min(u.len());
        let (first, rest) = u.split_at(if phase == 0 { 0 } else { head });
        let mut blocks = target.iter_mut();
        if phase != 0 && let Some(block) = blocks.next() {
            *block += first.iter().sum::<f32>();
        }
        if steps == 4 {
            // The default geometry, with a length that the compiler can unroll.
            let (whole, tail) = rest.as_chunks::<4>();
            // `whole` first: zip would take a block from `blocks` before it finds `whole` at its end.
            for ([a, b, c, d], block) in whole.iter().zip(blocks.by_ref()) {
                *block += (a + b) + (c + d);
            }
            if let (Some(block), false) = (blocks.next(), tail.is_empty()) {
                *block += tail.iter().sum::<f32>();
            }
        } else {
            for (block, values) in blocks.zip(rest.chunks(steps)) {
                *block += values.iter().sum::<f32>();
            }
        }
    }
}
