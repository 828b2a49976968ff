//! `fsa plan`: from shapes to tiles, workspace, operations and bytes, before there is any data.

mod routes;

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::options::{ConfigFlags, float_dtype};
use crate::output::{self, Output, Report};
use clap::Args;
use fsa::plan::{Plan, PlanInput, StagePlan};
use fsa::{AttentionArgs, AttentionShape, AttentionStage, Batch, DType, NsaConfig, TensorView, bf16, f16};
use routes::{RouteFlags, Routes};
use serde::Serialize;

/// Stages, tiles, workspace, operations and bytes of the whole operation, from shapes alone
///
/// With --device cuda or --gpu it says how stage `selected` goes in each pass: the route, the times of every way and why.
#[derive(Debug, Args)]
pub struct Flags {
    /// Tokens of each sequence, such as 65536 or 1000,200,3000
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "32768")]
    tokens: Vec<usize>,
    /// Keys of each sequence, where there are more than query rows (a cache) [as --tokens]
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    kv_tokens: Option<Vec<usize>>,
    /// Query heads
    #[arg(long, value_name = "N", default_value_t = 8)]
    num_q_heads: usize,
    /// Key and value heads
    #[arg(long, value_name = "N", default_value_t = 2)]
    num_kv_heads: usize,
    /// Elements of a query or key vector
    #[arg(long, value_name = "N", default_value_t = 64)]
    head_dim: usize,
    /// Elements of a value vector [as --head-dim]
    #[arg(long, value_name = "N")]
    value_dim: Option<usize>,
    /// Element type: f32, bf16 or f16 [f32; bf16 with a GPU]
    #[arg(long, value_name = "DTYPE", value_parser = float_dtype)]
    dtype: Option<DType>,
    /// Plan with a rotary embedding
    #[arg(long)]
    rope: bool,
    /// Plan with compression by a matrix product
    #[arg(long)]
    linear: bool,
    /// List every region of the workspace
    #[arg(long)]
    regions: bool,
    #[command(flatten)]
    config: ConfigFlags,
    #[command(flatten)]
    routes: RouteFlags,
}

#[derive(Debug, Serialize)]
struct Planned {
    config: NsaConfig,
    dtype: DType,
    plan: Plan,
    forward_flops: f64,
    backward_flops: f64,
    forward_workspace_bytes: usize,
    backward_workspace_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    routes: Option<Routes>,
    #[serde(skip)]
    regions: bool,
}

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    let config = flags.config.resolve()?;
    let batch = flags.batch()?;
    let shape = flags.shape(&batch)?;
    let routes = flags.routes.explain(&shape, &batch, &config)?;
    let input = PlanInput {
        shape,
        batch: &batch,
        config: &config,
        linear_compression: flags.linear,
        rope: flags.rope,
        workers: context.threads,
    };
    let plan = Plan::new(&input)?;
    let cost = plan.cost();
    context.output.report(&Planned {
        dtype: flags.dtype(),
        routes,
        forward_flops: cost.forward_flops,
        backward_flops: cost.backward_flops,
        forward_workspace_bytes: plan.forward_workspace_bytes(),
        backward_workspace_bytes: plan.backward_workspace_bytes(),
        config: config.clone(),
        regions: flags.regions,
        plan,
    })
}

/// Prefix sums of lengths, within the 31 bits that `cu_seqlens` has.
fn prefix_sums(flag: &str, lengths: &[usize]) -> Outcome<Vec<i32>> {
    let mut sums = vec![0i32];
    let mut total = 0usize;
    for length in lengths {
        total = total.saturating_add(*length);
        sums.push(i32::try_from(total).map_err(|_| Failure::misuse(flag, "a total below 2^31", total))?);
    }
    Ok(sums)
}

impl Flags {
    fn dtype(&self) -> DType {
        self.dtype.unwrap_or(if self.routes.is_gpu() { DType::Bf16 } else { DType::F32 })
    }

    fn batch(&self) -> Outcome<Batch> {
        let kv_tokens = self.kv_tokens.as_ref().unwrap_or(&self.tokens);
        let (q, kv) = (prefix_sums("--tokens", &self.tokens)?, prefix_sums("--kv-tokens", kv_tokens)?);
        Ok(Batch::from_cu_seqlens(&q, &kv)?)
    }

    /// The sizes, checked as those of a call are.
    fn shape(&self, batch: &Batch) -> Outcome<AttentionShape> {
        // One element, repeated by strides of 0, stands for tensors of any size.
        let view = |name: &str, rows: usize, heads: usize, dim: usize| {
            let (shape, strides) = ([rows, heads, dim], [0; 3]);
            match self.dtype() {
                DType::Bf16 => TensorView::strided(name, &[bf16::ZERO], &shape, &strides),
                DType::F16 => TensorView::strided(name, &[f16::ZERO], &shape, &strides),
                _ => TensorView::strided(name, &[0.0f32], &shape, &strides),
            }
        };
        let (rows, keys) = (batch.total_q(), batch.total_kv());
        let value_dim = self.value_dim.unwrap_or(self.head_dim);
        let args = AttentionArgs {
            query: view("query", rows, self.num_q_heads, self.head_dim)?,
            key: view("key", keys, self.num_kv_heads, self.head_dim)?,
            value: view("value", keys, self.num_kv_heads, value_dim)?,
            batch,
            softmax_scale: None,
        };
        Ok(args.shape(&AttentionStage::Dense)?)
    }
}

fn stage_row(stage: &StagePlan, name: &str) -> Vec<String> {
    vec![
        name.to_string(),
        format!("{:.2}", stage.cost.forward_flops / 1e9),
        format!("{:.2}", stage.cost.backward_flops / 1e9),
        output::bytes(stage.cost.forward_bytes),
        output::bytes(stage.forward_workspace_bytes()),
        output::bytes(stage.backward_workspace_bytes()),
        stage.work_items.to_string(),
        stage.tile.clone(),
    ]
}

impl Planned {
    fn show_regions(&self, output: &Output) -> Outcome {
        let mut table = output.new_table(&["<workspace of", "<region", "bytes", "copies"]);
        for stage in self.plan.stages.iter().chain([&self.plan.dense]) {
            let passes = [(&stage.forward_workspace, "forward"), (&stage.backward_workspace, "backward")];
            for (region, pass) in passes.into_iter().flat_map(|(list, pass)| list.iter().map(move |r| (r, pass))) {
                let owner = format!("{} {pass}", stage.stage);
                let (bytes, copies) = (output::bytes(region.bytes), region.copies.to_string());
                table.add_row([owner, region.name.to_string(), bytes, copies]);
            }
        }
        output.table(&table)
    }
}

impl Report for Planned {
    fn show(&self, output: &Output) -> Outcome {
        let plan = &self.plan;
        output.line(format!("{}; {} threads", plan.description, plan.workers))?;
        let mut table = output.new_table(&[
            "<stage",
            "GFLOP",
            "backward",
            "least bytes",
            "workspace",
            "backward",
            "work items",
            "<tile",
        ]);
        for stage in &plan.stages {
            table.add_row(stage_row(stage, stage.stage.name()));
        }
        let cost = plan.cost();
        table.add_row([
            "nsa".to_string(),
            format!("{:.2}", cost.forward_flops / 1e9),
            format!("{:.2}", cost.backward_flops / 1e9),
            output::bytes(cost.forward_bytes),
            output::bytes(self.forward_workspace_bytes),
            output::bytes(self.backward_workspace_bytes),
        ]);
        table.add_row(stage_row(&plan.dense, "dense"));
        output.table(&table)?;
        if self.regions {
            self.show_regions(output)?;
        }
        if let Some(routes) = &self.routes {
            routes.show(output)?;
        }
        let dense = plan.dense.cost;
        output.line(format!(
            "dense attention takes {:.2}x the operations forward, {:.2}x backward; {} are kept for the backward",
            dense.forward_flops / cost.forward_flops.max(1.0),
            dense.backward_flops / cost.backward_flops.max(1.0),
            output::bytes(plan.saved_bytes),
        ))
    }
}
