//! What `fsa bench` prints.

use super::{List, Record, Row};
use crate::failure::Outcome;
use crate::output::{self, Output, Report};

/// The error of the worst tensor, in units of its bound.
fn error_ratio(row: &Row) -> String {
    format!("{:.3}", row.max_error / row.error_bound.max(f64::MIN_POSITIVE))
}

impl Report for Record {
    fn show(&self, output: &Output) -> Outcome {
        let machine = &self.machine;
        if let Some(gpu) = &machine.gpu {
            output.line(format!("{}: {}; commit {}", self.suite, gpu.line(), self.commit))?;
            return self.show_device(output);
        }
        output.line(format!(
            "{}: {}, {} cores, {} threads, {}; commit {}",
            self.suite, machine.cpu, machine.cores, machine.threads, machine.simd, self.commit
        ))?;
        let mut table = output.new_table(&[
            "<stage/pass/dtype/heads/head_dim/block-topk/tokens",
            "median",
            "20 % .. 80 %",
            "runs",
            "GFLOP/s",
            "of matrix product",
            "times dense",
            "error / bound",
        ]);
        for row in &self.results {
            let times = &row.times;
            table.add_row([
                row.name.clone(),
                output::duration(times.median_ms),
                format!("{} .. {}", output::duration(times.p20_ms), output::duration(times.p80_ms)),
                times.repetitions.to_string(),
                format!("{:.1}", row.gflops),
                row.matrix_share
                    .zip(row.matrix_gflops)
                    .map_or(String::new(), |(share, rate)| format!("{:.1} % of {rate:.0}", 100.0 * share)),
                row.speedup.map_or(String::new(), |speedup| format!("{speedup:.2}x")),
                error_ratio(row),
            ]);
        }
        output.table(&table)
    }
}

impl Report for List {
    fn show(&self, output: &Output) -> Outcome {
        for suite in &self.suites {
            output.line(format!("{}: {}", suite.name, suite.description))?;
            for row in &suite.rows {
                output.line(format!("  {row}"))?;
            }
        }
        Ok(())
    }
}

impl Record {
    /// Rows of a GPU: launched calls, replays, and what the host does.
    fn show_device(&self, output: &Output) -> Outcome {
        let mut table = output.new_table(&[
            "<stage/pass/dtype/heads/head_dim/block-topk/tokens",
            "median",
            "20 % .. 80 %",
            "runs",
            "TFLOP/s",
            "replayed",
            "host: launch",
            "plan and launch",
            "replay",
            "workspace",
            "error / bound",
        ]);
        for row in &self.results {
            let Some(device) = &row.device else { continue };
            let (times, host) = (&row.times, |us: f64| format!("{us:.1} us"));
            table.add_row([
                row.name.clone(),
                output::duration(times.median_ms),
                format!("{} .. {}", output::duration(times.p20_ms), output::duration(times.p80_ms)),
                times.repetitions.to_string(),
                format!("{:.1}", row.gflops / 1e3),
                output::duration(device.graph_median_ms),
                host(device.host_us),
                host(device.plan_host_us),
                host(device.graph_host_us),
                output::bytes(device.workspace_bytes),
                error_ratio(row),
            ]);
        }
        output.table(&table)
    }
}
