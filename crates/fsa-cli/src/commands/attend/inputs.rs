//! The tensors that `fsa attend` reads.

use super::{Flags, StageFlag};
use crate::failure::{Failure, Outcome};
use crate::tensor_file::TensorFile;
use fsa::{Batch, Compression, Tensor};

/// Parameters of a compression, as stored.
#[derive(Debug, Default)]
pub struct Parameters {
    weight: Option<Tensor>,
    position: Option<Tensor>,
}

impl Parameters {
    fn read(file: &mut TensorFile, prefix: &str) -> Outcome<Self> {
        let (weight, position) = (format!("{prefix}_weight"), format!("{prefix}_position"));
        let parameters = Self { weight: file.read_optional(&weight)?, position: file.read_optional(&position)? };
        let rank = parameters.weight.as_ref().map_or(0, |tensor| tensor.shape().len());
        if parameters.weight.is_some() && rank != 2 && rank != 3 {
            let expected = "rank 2 [num_kv_heads, kernel_size] or rank 3 [num_kv_heads, kernel_size * dim, dim]";
            return Err(Failure::misuse(weight, expected, format!("rank {rank}")));
        }
        if parameters.position.is_some() && rank != 3 {
            let got = if rank == 0 { "none" } else { "one of rank 2" };
            return Err(Failure::misuse(position, format!("{weight} of rank 3 beside it"), got));
        }
        Ok(parameters)
    }

    /// Mean without a weight, weighted with one of rank 2, linear with one of rank 3.
    pub fn compression(&self) -> Compression<'_> {
        match &self.weight {
            None => Compression::Mean,
            Some(weight) if weight.shape().len() == 2 => Compression::Weighted { weight: weight.view() },
            Some(weight) => {
                Compression::Linear { weight: weight.view(), position: self.position.as_ref().map(Tensor::view) }
            }
        }
    }
}

/// Everything that the chosen operation needs of the file.
#[derive(Debug)]
pub struct Inputs {
    /// `[total_q, num_q_heads, head_dim]`.
    pub query: Tensor,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub key: Tensor,
    /// `[total_kv, num_kv_heads, value_dim]`.
    pub value: Tensor,
    /// Where the sequences lie.
    pub batch: Batch,
    /// For `nsa`.
    pub gates: Option<Tensor>,
    /// Compression of keys.
    pub key_parameters: Parameters,
    /// Compression of values.
    pub value_parameters: Parameters,
    /// For `selected`.
    pub topk_indices: Option<Tensor>,
    /// For the backward.
    pub grad_out: Option<Tensor>,
    /// For the backward, where the file has it.
    pub grad_lse: Option<Tensor>,
}

impl Inputs {
    /// Reads what `flags` ask for.
    pub fn read(file: &mut TensorFile, flags: &Flags) -> Outcome<Self> {
        let (query, key) = (file.read("query")?, file.read("key")?);
        let value = file.read("value")?;
        let batch = read_batch(file, &query, &key)?;
        let compresses = matches!(flags.stage, StageFlag::Nsa | StageFlag::Compressed);
        let parameters = |file: &mut TensorFile, prefix: &str| {
            if compresses { Parameters::read(file, prefix) } else { Ok(Parameters::default()) }
        };
        let gates = if flags.stage == StageFlag::Nsa { Some(read_gates(file, flags, &query)?) } else { None };
        let selected = flags.stage == StageFlag::Selected;
        let grad_out = if flags.backward { Some(file.read("grad_out")?) } else { None };
        let grad_lse = if flags.backward { file.read_optional("grad_lse")? } else { None };
        if grad_lse.is_some() && flags.stage == StageFlag::Nsa {
            return Err(Failure::misuse("grad_lse", "none: nsa has no lse of its own", "one"));
        }
        Ok(Self {
            key_parameters: parameters(file, "key")?,
            value_parameters: parameters(file, "value")?,
            topk_indices: if selected { Some(file.read_integers("topk_indices")?) } else { None },
            query,
            key,
            value,
            batch,
            gates,
            grad_out,
            grad_lse,
        })
    }
}

/// The stored gates, or constant ones. Gates weigh whole branches: nothing sensible can be assumed for them.
fn read_gates(file: &mut TensorFile, flags: &Flags, query: &Tensor) -> Outcome<Tensor> {
    match (file.has("gates"), flags.gates) {
        (true, None) => file.read("gates"),
        (true, Some(_)) => Err(Failure::misuse("--gates", "a file without the tensor gates", "one that has it")),
        (false, None) => {
            let expected = "a tensor of that name, or --gates C,S,W for constant ones (such as --gates 0.33,0.33,0.33)";
            Err(Failure::misuse("gates", expected, "neither"))
        }
        (false, Some(gates)) => {
            let rows = query.shape().first().copied().unwrap_or(0);
            let row = gates.map(|gate| gate as f32);
            Ok(Tensor::from_f32("gates", &row.repeat(rows), query.dtype(), &[rows, 3])?)
        }
    }
}

fn read_batch(file: &mut TensorFile, query: &Tensor, key: &Tensor) -> Outcome<Batch> {
    let sums = |file: &mut TensorFile, name: &str| -> Outcome<Vec<i32>> {
        let tensor = file.read_integers(name)?;
        if tensor.shape().len() != 1 {
            return Err(Failure::misuse(name, "rank 1 [batch + 1]", format!("shape {:?}", tensor.shape())));
        }
        Ok(tensor.as_slice::<i32>(name)?.to_vec())
    };
    let (q, kv) = if file.has("cu_seqlens") {
        let both = sums(file, "cu_seqlens")?;
        (both.clone(), both)
    } else if file.has("cu_seqlens_q") || file.has("cu_seqlens_kv") {
        (sums(file, "cu_seqlens_q")?, sums(file, "cu_seqlens_kv")?)
    } else {
        let whole = |name: &str, tensor: &Tensor| {
            let rows = tensor.shape().first().copied().unwrap_or(0);
            i32::try_from(rows).map(|rows| vec![0, rows]).map_err(|_| Failure::misuse(name, "below 2^31 rows", rows))
        };
        (whole("query", query)?, whole("key", key)?)
    };
    Batch::from_cu_seqlens(&q, &kv).map_err(|error| match error {
        // One array stands for both: name the one that the file has.
        fsa::Error::Input(mut input) if file.has("cu_seqlens") => {
            input.argument = "cu_seqlens".into();
            Failure::Library(input.into())
        }
        other => Failure::Library(other),
    })
}
