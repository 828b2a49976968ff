//! The yardstick of the machine: how fast the `gemm` crate multiplies two f32 matrices with all threads.

use gemm::Parallelism;
use std::time::Instant;

/// Rows and columns of the factors.
const SIZE: usize = 1024;
/// Products after a first one that warms up; the median counts.
const REPETITIONS: usize = 5;

/// Measures in a pool of its own, of as many threads as the backend has.
#[derive(Debug)]
pub struct MatrixRate {
    pool: rayon::ThreadPool,
    lhs: Vec<f32>,
    rhs: Vec<f32>,
    out: Vec<f32>,
}

impl MatrixRate {
    /// Starts the threads and fills the factors.
    pub fn new(threads: usize) -> fsa::Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let failed = |error: rayon::ThreadPoolBuildError| fsa::Error::Backend {
            backend: "gemm".into(),
            message: error.to_string(),
        };
        let factor = |seed| crate::random::normal(seed, SIZE * SIZE);
        Ok(Self { pool: pool.map_err(failed)?, lhs: factor(1), rhs: factor(2), out: vec![0.0; SIZE * SIZE] })
    }

    /// GFLOP/s now.
    pub fn gflops(&mut self) -> f64 {
        let threads = self.pool.current_num_threads();
        let (lhs, rhs, out) = (&self.lhs, &self.rhs, &mut self.out);
        let mut times: Vec<f64> = self.pool.install(|| {
            multiply(lhs, rhs, out, threads);
            (0..REPETITIONS)
                .map(|_| {
                    let start = Instant::now();
                    multiply(lhs, rhs, out, threads);
                    start.elapsed().as_secs_f64()
                })
                .collect()
        });
        times.sort_by(f64::total_cmp);
        2.0 * (SIZE as f64).powi(3) / times[REPETITIONS / 2] / 1e9
    }
}

/// `out = lhs * rhs`, row-major.
#[allow(unsafe_code)]
fn multiply(lhs: &[f32], rhs: &[f32], out: &mut [f32], threads: usize) {
    assert!([lhs.len(), rhs.len(), out.len()] == [SIZE * SIZE; 3]);
    let (column, row) = (1, SIZE as isize);
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    // SAFETY: the assertion above establishes that every element that SIZE rows and columns reach with these
    // strides lies inside of its slice; `out` is borrowed mutably, so it overlaps neither factor.
    unsafe {
        gemm::gemm(
            SIZE,
            SIZE,
            SIZE,
            out.as_mut_ptr(),
            column,
            row,
            false,
            lhs.as_ptr(),
            column,
            row,
            rhs.as_ptr(),
            column,
            row,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_is_the_product() {
        let mut rate = MatrixRate::new(1).expect("a thread");
        assert!(rate.gflops() > 0.01);
        for (i, j) in [(0, 0), (17, 900), (1023, 1023)] {
            let terms = (0..SIZE).map(|k| f64::from(rate.lhs[i * SIZE + k]) * f64::from(rate.rhs[k * SIZE + j]));
            let expected: f64 = terms.sum();
            assert!((f64::from(rate.out[i * SIZE + j]) - expected).abs() < 1e-2, "{i} {j}");
        }
    }
}
