//! Stage `compress`.

use crate::failure::{Failure, renamed};
use crate::memory::{Memory, Role, write_views};
use crate::packed::{compressed_count, prefix_sums};
use crate::run::run;
use fsa::{Batch, CompressArgs, CompressGrads, Compression, Error, Result};
use pyo3::prelude::*;

/// `(weight, position)`: none is the mean, a weight of rank 2 weighs the window, one of rank 3 is linear.
pub type Parameters<'py> = (Option<Memory<'py>>, Option<Memory<'py>>);

/// The compression that `parameters` stand for. `name` is that of the compressed argument.
pub fn compression<'a>(parameters: &'a Parameters<'_>, name: &str) -> Result<Compression<'a>> {
    let (weight, position) = parameters;
    let position =
        position.as_ref().map(|memory| memory.view(&format!("{name}_position"), Role::Number)).transpose()?;
    let Some(memory) = weight else {
        return without_position(Compression::Mean, position.is_some(), name);
    };
    let argument = format!("{name}_weight");
    let weight = memory.view(&argument, Role::Number)?;
    match memory.shape().len() {
        2 => without_position(Compression::Weighted { weight }, position.is_some(), name),
        3 => Ok(Compression::Linear { weight, position }),
        _ => {
            let expected = "shape [num_kv_heads, kernel_size] or [num_kv_heads, kernel_size * dim, dim]";
            Err(Error::input(argument, expected, format!("shape {:?}", memory.shape())))
        }
    }
}

fn without_position<'a>(compression: Compression<'a>, position: bool, name: &str) -> Result<Compression<'a>> {
    if position {
        let expected = format!("None: compression {} has no position embedding", compression.name());
        return Err(Error::input(format!("{name}_position"), expected, "one"));
    }
    Ok(compression)
}

/// `(input, cu_seqlens_k)`.
type Input<'py> = (Memory<'py>, Memory<'py>);

fn batch_of(name: &str, (input, cu_seqlens_k): &Input<'_>) -> Result<Batch> {
    input.check_host(name)?;
    let sums = prefix_sums("cu_seqlens_k", cu_seqlens_k)?;
    Batch::from_cu_seqlens(&vec![0; sums.len()], &sums)
}

fn compress_args<'a>(
    input: &'a Input<'_>,
    batch: &'a Batch,
    geometry: (usize, usize),
    parameters: &'a Parameters<'_>,
    name: &str,
) -> Result<CompressArgs<'a>> {
    let (kernel_size, kernel_stride) = geometry;
    let compression = compression(parameters, name)?;
    let args =
        CompressArgs { input: input.0.view(name, Role::Number)?, batch, kernel_size, kernel_stride, compression };
    let (weight, position) = (format!("{name}_weight"), format!("{name}_position"));
    let names = [("input", name), ("weight", &weight), ("position", &position)];
    args.shape().map_err(|error| renamed(error, &names))?;
    Ok(args)
}

/// Writes the compressed rows of `input` to the front of `out`.
#[pyfunction]
pub fn compress(
    py: Python<'_>,
    name: &str,
    geometry: (usize, usize),
    input: Input<'_>,
    parameters: Parameters<'_>,
    mut out: Memory<'_>,
) -> Result<(), Failure> {
    let batch = batch_of(name, &input)?;
    let args = compress_args(&input, &batch, geometry, &parameters, name)?;
    let (weight, position) = &parameters;
    let read: Vec<_> = [&input.0, &input.1].into_iter().chain(weight).chain(position).collect();
    let ([mut out], []) = write_views(&read, [("out", Role::Number, &mut out)], [])?;
    let rows = compressed_count("out", out.shape(), &batch, geometry.0, geometry.1)?;
    run(py, |engine| engine.compress_into(&args, &mut out.slice_axis("out", 0, 0..rows)?))
}

/// `(grad_input, grad_weight or None, grad_position or None)`.
type Grads<'py> = (Memory<'py>, Option<Memory<'py>>, Option<Memory<'py>>);

/// Writes the gradients of `input` and of the parameters that are asked for.
#[pyfunction]
pub fn compress_backward(
    py: Python<'_>,
    name: &str,
    geometry: (usize, usize),
    input: Input<'_>,
    parameters: Parameters<'_>,
    grad_out: Memory<'_>,
    mut grads: Grads<'_>,
) -> Result<(), Failure> {
    let batch = batch_of(name, &input)?;
    let args = compress_args(&input, &batch, geometry, &parameters, name)?;
    let rows = compressed_count("grad_out", grad_out.shape(), &batch, geometry.0, geometry.1)?;
    let grad = grad_out.view("grad_out", Role::Number)?.slice_axis("grad_out", 0, 0..rows)?;
    let (weight, position) = &parameters;
    let read: Vec<_> = [&input.0, &input.1, &grad_out].into_iter().chain(weight).chain(position).collect();
    let (grad_input, grad_weight, grad_position) = &mut grads;
    let optional = [("grad_weight", grad_weight), ("grad_position", grad_position)];
    let optional = optional.map(|(name, memory)| memory.as_mut().map(|memory| (name, Role::Number, memory)));
    let required = [("grad_input", Role::Number, grad_input)];
    let ([grad_input], [grad_weight, grad_position]) = write_views(&read, required, optional)?;
    let mut grads = CompressGrads { grad_input, grad_weight, grad_position };
    run(py, |engine| engine.compress_backward_into(&args, &grad, &mut grads))
}
