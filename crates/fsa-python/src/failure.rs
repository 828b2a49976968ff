//! Errors to Python exceptions, in the argument names of the Python functions.

use fsa::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyRuntimeError, PyValueError};

/// Argument names of the Rust interface and of the Python functions.
const NAMES: [(&str, &str); 15] = [
    ("query", "q"),
    ("key", "k"),
    ("value", "v"),
    ("cu_seqlens_kv", "cu_seqlens_k"),
    ("grad_query", "grad_q"),
    ("grad_key", "grad_k"),
    ("grad_value", "grad_v"),
    ("key_compression.weight", "k_weight"),
    ("key_compression.position", "k_position"),
    ("value_compression.weight", "v_weight"),
    ("value_compression.position", "v_position"),
    ("rope.theta", "rope_theta"),
    ("rope.high_freq_factor", "rope_scaling['high_freq_factor']"),
    ("rope.factor", "rope_scaling['factor']"),
    ("rope.original_max_position", "rope_scaling['original_max_position_embeddings']"),
];

/// The exception that a call raises; an [`Error`] becomes one by `?`.
pub struct Failure(PyErr);

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(exception(error))
    }
}

impl Failure {
    /// A panic, caught: a bug, but none that ends the interpreter.
    pub fn from_panic(message: &str) -> Self {
        Self(PyRuntimeError::new_err(format!("internal error, please report it: {message}")))
    }
}

/// The exception that stands for `error`.
fn exception(error: Error) -> PyErr {
    match error {
        Error::Input(input) => {
            let known = NAMES.iter().find(|(rust, _)| *rust == input.argument);
            let argument = known.map_or(input.argument.as_str(), |(_, python)| python);
            // Messages mention other arguments only as prefix sums: `the last element of cu_seqlens_kv`.
            let expected = dtypes(input.expected.replace("cu_seqlens_kv", "cu_seqlens_k"));
            PyValueError::new_err(format!("{argument}: expected {expected}, got {}", dtypes(input.got)))
        }
        Error::Unsupported { .. } => PyNotImplementedError::new_err(error.to_string()),
        Error::OutOfMemory { .. } => PyMemoryError::new_err(error.to_string()),
        other => PyRuntimeError::new_err(other.to_string()),
    }
}

/// A text about a dtype, with the names of NumPy and PyTorch.
fn dtypes(text: String) -> String {
    if !text.starts_with("dtype ") {
        return text;
    }
    let names = [("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32"), ("i32", "int32")];
    names.iter().fold(text, |text, (rust, python)| text.replace(rust, python))
}

/// Puts the names of a call in the place of those that a stage uses.
pub fn renamed(error: Error, names: &[(&str, &str)]) -> Error {
    match error {
        Error::Input(mut input) => {
            if let Some((_, name)) = names.iter().find(|(stage, _)| *stage == input.argument) {
                input.argument = (*name).to_string();
            }
            Error::Input(input)
        }
        other => other,
    }
}
