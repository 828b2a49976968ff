use super::*;

/// Deterministic values in (-1, 1).
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

#[test]
fn products_of_every_shape_equal_plain_loops() {
    for isa in Isa::available() {
        for (rows, depth, columns) in [(1, 1, 16), (5, 8, 16), (6, 64, 64), (13, 17, 48), (48, 33, 80), (7, 3, 256)] {
            for (by_columns, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
                let (left_stride, right_stride, out_stride) =
                    (if by_columns { rows + 3 } else { depth + 5 }, columns + 16, columns + 32);
                let left = values(left_stride * rows.max(depth) + rows, 1);
                let right = values(right_stride * depth, 2);
                let before = values(out_stride * rows, 3);
                let mut out = before.clone();
                let operand = if by_columns {
                    Left::Columns { data: &left, stride: left_stride }
                } else {
                    Left::Rows { data: &left, stride: left_stride }
                };
                Product {
                    left: operand,
                    right: (&right, right_stride),
                    out: (&mut out, out_stride),
                    size: [rows, depth, columns],
                    accumulate,
                }
                .run(isa);
                for r in 0..rows {
                    for c in 0..out_stride {
                        let at =
                            |k: usize| if by_columns { left[k * left_stride + r] } else { left[r * left_stride + k] };
                        let sum: f64 = (0..depth)
                            .map(|k| f64::from(at(k)) * f64::from(right[k * right_stride + c.min(columns - 1)]))
                            .sum();
                        let index = r * out_stride + c;
                        let expected = match (c < columns, accumulate) {
                            (false, _) => f64::from(before[index]),
                            (true, false) => sum,
                            (true, true) => f64::from(before[index]) + sum,
                        };
                        let error = (f64::from(out[index]) - expected).abs();
                        assert!(error < 1e-6 * depth as f64, "{isa:?} {rows}x{depth}x{columns} ({r}, {c}): {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn exp2_is_within_two_ulps_and_keeps_nan() {
    for isa in Isa::available() {
        let inputs: Vec<f32> = (0..40_000).map(|i| -126.0 + i as f32 * 0.003_15).collect();
        let mut outputs = inputs.clone();
        exp2_in_place(isa, &mut outputs);
        for (x, y) in inputs.iter().zip(&outputs) {
            let expected = f64::from(*x).exp2();
            assert!((f64::from(*y) / expected - 1.0).abs() < 2.4e-7, "{isa:?} 2^{x} = {y}");
        }
        let mut special = [f32::NEG_INFINITY, -1e30, -127.0, f32::NAN, 0.0, 1.0];
        exp2_in_place(isa, &mut special);
        assert_eq!((special[0], special[1], special[2], special[4], special[5]), (0.0, 0.0, 0.0, 1.0, 2.0));
        assert!(special[3].is_nan(), "{isa:?}");
    }
}

#[test]
fn softmax_hides_what_is_not_visible_even_nan() {
    for isa in Isa::available() {
        let mut scores = values(4 * 32, 7);
        scores[3] = f32::NAN;
        scores[31] = f32::INFINITY;
        let plain = scores.clone();
        let visible = [(4, 30), (0, 0), (0, 32), (9, 10)];
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; 16], vec![0.0; 16]);
        let mut correction = vec![0.0; 16];
        let state = Online { max: &mut max, sum: &mut sum, correction: &mut correction };
        softmax_strip(isa, SoftmaxStrip { scores: &mut scores, exponent: 1.0, columns: 32, visible: &visible, state });
        for (r, (first, end)) in visible.iter().enumerate() {
            let row = &scores[r * 32..(r + 1) * 32];
            let seen = &plain[r * 32..][*first as usize..*end as usize];
            let expected: f64 = seen.iter().map(|s| f64::from(*s).exp2()).sum();
            let got = f64::from(sum[r]) * f64::from(max[r]).exp2();
            assert!(if seen.is_empty() { sum[r] == 0.0 } else { (got / expected - 1.0).abs() < 1e-6 }, "{isa:?} {r}");
            assert!(row.iter().enumerate().all(|(c, p)| (*first..*end).contains(&(c as u32)) || *p == 0.0));
        }
        assert_eq!(max[1], f32::NEG_INFINITY);
    }
}

#[test]
fn transposes_and_row_kernels_equal_plain_loops() {
    for isa in Isa::available() {
        let source = values(13 * 24, 5);
        let mut target = vec![0.0; 20 * 16];
        transpose(isa, &mut target, 16, &source, 24, 13, 20);
        assert!((0..13).all(|r| (0..20).all(|c| target[c * 16 + r] == source[r * 24 + c])));
        let (a, b) = (values(48, 8), values(48, 9));
        let expected: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        assert!((f64::from(dot(isa, &a, &b)) - expected).abs() < 1e-5);
        assert!(all_finite(isa, &a));
        let mut c = a.clone();
        c[47] = f32::NEG_INFINITY;
        assert!(!all_finite(isa, &c));
        c[47] = f32::NAN;
        assert!(!all_finite(isa, &c));
    }
}

#[test]
fn moving_sums_over_tiles_equal_the_definition() {
    for isa in Isa::available() {
        for (steps, reach) in [(4, 1), (4, 0), (4, 3), (1, 0), (2, 5), (16, 1), (3, 2)] {
            for (first, lengths) in [(0, [64, 64, 32]), (48, [16, 64, 48]), (5, [16, 16, 32])] {
                let p = values(lengths.iter().sum(), 11);
                let mut blocks = vec![0.0f32; (first + p.len()) / steps + reach + 2];
                let mut start = 0;
                for length in lengths {
                    let tile = &p[start..start + length];
                    let key = first + start;
                    let mut u = vec![f32::NAN; length + reach];
                    sum_windows(isa, &mut u, tile, reach, key % steps, steps, &mut blocks[key / steps..]);
                    start += length;
                }
                for (j, block) in blocks.iter().enumerate() {
                    let pairs =
                        (0..steps).flat_map(|m| (0..=reach).map(move |n| (j * steps + m) as isize - n as isize));
                    let at = |i: isize| usize::try_from(i - first as isize).ok().and_then(|i| p.get(i)).copied();
                    let expected: f32 = pairs.filter_map(at).sum();
                    assert!(
                        (block - expected).abs() < 1e-4,
                        "{isa:?} steps {steps} reach {reach} first {first} block {j}"
                    );
                }
            }
        }
    }
}
