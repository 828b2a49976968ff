//! How stage `selected` goes on a GPU: the route of each pass, the times of every way, and why.

use crate::failure::{Failure, Outcome};
use crate::options::{self, Device, DeviceFlags};
use crate::output::Output;
use clap::{Args, ValueEnum};
use fsa::cuda::driver::DeviceFacts;
use fsa::cuda::plan::{Explained, Pass, Problem, Route, Routing, Sizes};
use fsa::cuda::source::HEAD_DIMS;
use fsa::{AttentionShape, Batch, NsaConfig};
use serde::Serialize;

const PASSES: [Pass; 2] = [Pass::Forward, Pass::Backward];

/// GPUs whose plans any machine can make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KnownGpu {
    /// NVIDIA H200
    H200,
    /// NVIDIA A100
    A100,
}

/// For which GPU the routes are chosen.
#[derive(Debug, Args)]
pub struct RouteFlags {
    #[command(flatten)]
    device: DeviceFlags,
    /// Choose routes for this GPU, which need not be here
    #[arg(long, value_enum, value_name = "NAME", conflicts_with_all = ["device", "kernels", "route", "measure"])]
    gpu: Option<KnownGpu>,
    /// Time both routes on this GPU and keep the times: plans of such calls take the faster from then on
    #[arg(long)]
    measure: bool,
}

/// The routes of stage `selected` in the whole operation.
#[derive(Debug, Serialize)]
pub struct Routes {
    /// The GPU.
    gpu: String,
    /// Of each pass.
    passes: Vec<Explained>,
}

impl RouteFlags {
    /// Whether routes are asked for.
    pub fn is_gpu(&self) -> bool {
        self.gpu.is_some() || self.device.device == Device::Cuda
    }

    /// The routes of the whole operation; none for the CPU, which has one.
    pub fn explain(&self, shape: &AttentionShape, batch: &Batch, config: &NsaConfig) -> Outcome<Option<Routes>> {
        self.device.check()?;
        if self.measure && self.device.device == Device::Cpu {
            return Err(Failure::misuse("--measure", "--device cuda", "--device cpu"));
        }
        if !self.is_gpu() {
            return Ok(None);
        }
        let known = HEAD_DIMS.into_iter().find(|dim| *dim >= shape.head_dim.max(shape.value_dim));
        let dim = known.unwrap_or(shape.head_dim);
        let sizes = Sizes::new(shape, batch.sequences().len(), batch.total_kv(), dim);
        let problem = sizes.selected(config.block_size, config.topk);
        let known = |facts: DeviceFacts| {
            problem.check(&facts, &[])?;
            let explain = |pass| Explained::new(&problem, pass, (facts.arch.kernels(), &facts), Routing::Fastest, None);
            Ok(Some(Routes { gpu: facts.name.clone(), passes: PASSES.map(explain).into() }))
        };
        match self.gpu {
            Some(KnownGpu::H200) => known(DeviceFacts::h200()),
            Some(KnownGpu::A100) => known(DeviceFacts::a100()),
            None => self.explain_here(&problem, batch).map(Some),
        }
    }

    fn explain_here(&self, problem: &Problem, batch: &Batch) -> Outcome<Routes> {
        let backend = options::cuda(&self.device)?;
        let kernels = backend.kernels();
        let facts = kernels.device().facts();
        problem.check(facts, &[])?;
        if self.measure {
            backend.check_compiler()?;
            PASSES.into_iter().try_for_each(|pass| kernels.measure(problem, batch, pass).map(drop))?;
        }
        let explain = |pass| {
            let measured = kernels.measured().get(problem, pass);
            Explained::new(problem, pass, (kernels.set(), facts), kernels.routing(), measured)
        };
        Ok(Routes { gpu: facts.name.clone(), passes: PASSES.map(explain).into() })
    }
}

impl Routes {
    /// A line for each pass, and the times of every way.
    pub fn show(&self, output: &Output) -> Outcome {
        output.line(format!("stage selected on {}:", self.gpu))?;
        self.passes.iter().try_for_each(|pass| output.line(format!("  {pass}")))?;
        let headers = ["<ms", "KV-outer", "dense", "query-outer, not built", "dense attention"];
        let mut table = output.new_table(&headers);
        for explained in &self.passes {
            let predicted = &explained.predicted;
            let name = if explained.pass == Pass::Forward { "forward" } else { "backward" };
            let slower = predicted.query_outer / explained.ms(explained.route);
            table.add_row([
                name.to_string(),
                format!("{:.3}", explained.ms(Route::KvOuter)),
                format!("{:.3}", explained.ms(Route::DenseMasked)),
                format!("{:.3}, {slower:.1}x", predicted.query_outer),
                format!("{:.3}", predicted.dense),
            ]);
        }
        output.table(&table)
    }
}
