//! Runs the command and makes files for it.
#![allow(dead_code)]

use fsa::{DType, Element, Storage, Tensor};
use safetensors::{Dtype, View};
use serde_json::Value;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a run of the command left.
#[derive(Debug)]
pub struct Run {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// Requires a misuse that names all of `texts` on standard error and prints nothing else.
    #[track_caller]
    pub fn is_misuse(&self, texts: &[&str]) {
        assert_eq!(self.code, 2, "{self:?}");
        assert_eq!(self.stdout, "");
        for text in texts {
            assert!(self.stderr.contains(text), "{text:?} is not in {:?}", self.stderr);
        }
    }
}

/// Runs `fsa` with `arguments` on 2 threads, untouched by the environment.
pub fn fsa(arguments: &[&str]) -> Run {
    fsa_with(arguments, &[])
}

/// Runs `fsa` with environment variables.
pub fn fsa_with(arguments: &[&str], environment: &[(&str, &str)]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsa"));
    for name in ["FSA_NUM_THREADS", "RAYON_NUM_THREADS", "NO_COLOR"] {
        command.env_remove(name);
    }
    command.env("FSA_NUM_THREADS", "2").envs(environment.iter().copied());
    let output = command.args(arguments).output().expect("the command starts");
    Run {
        code: output.status.code().expect("an exit code"),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// A folder that disappears with the test.
pub struct Folder(tempfile::TempDir);

impl Folder {
    /// An empty folder.
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("temporary folder"))
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A path in it, as an argument.
    pub fn argument(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The names in it, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).expect("readable");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// A tensor as a file holds it, of any dtype.
pub struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    /// Raw bytes.
    pub fn raw(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        Self { dtype, shape: shape.to_vec(), bytes }
    }

    /// 64-bit integers.
    pub fn i64(shape: &[usize], values: &[i64]) -> Self {
        Self::raw(Dtype::I64, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
}

impl From<&Tensor> for Stored {
    fn from(tensor: &Tensor) -> Self {
        let (dtype, bytes) = match tensor.storage() {
            Storage::F32(data) => (Dtype::F32, bytemuck::cast_slice(data).to_vec()),
            Storage::Bf16(data) => (Dtype::BF16, bytemuck::cast_slice(data).to_vec()),
            Storage::F16(data) => (Dtype::F16, bytemuck::cast_slice(data).to_vec()),
            Storage::I32(data) => (Dtype::I32, bytemuck::cast_slice(data).to_vec()),
        };
        Self::raw(dtype, tensor.shape(), bytes)
    }
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes a safetensors file.
pub fn write(path: &Path, tensors: &[(&str, Stored)]) {
    let entries = tensors.iter().map(|(name, stored)| (*name, stored));
    safetensors::serialize_to_file(entries, None, path).expect("written");
}

/// Reads one tensor of a safetensors file as raw bytes, with its dtype and shape.
pub fn read(path: &Path, name: &str) -> (Dtype, Vec<usize>, Vec<u8>) {
    let bytes = std::fs::read(path).expect("readable");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = file.tensor(name).unwrap_or_else(|_| panic!("{name} among {:?}", file.names()));
    (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec())
}

/// Requires that the file holds exactly `tensor` under `name`.
#[track_caller]
pub fn holds(path: &Path, name: &str, tensor: &Tensor) {
    let Stored { dtype, shape, bytes } = Stored::from(tensor);
    let read = read(path, name);
    assert_eq!((read.0, &read.1), (dtype, &shape), "{name}");
    assert!(read.2 == bytes, "{name} has other elements");
}

/// Smooth numbers that differ by `seed`.
pub fn numbers(seed: usize, dtype: DType, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| ((i * 7 + seed * 1013) as f32 * 0.37).sin()).collect();
    Tensor::from_f32("numbers", &values, dtype, shape).expect("shape")
}

/// A tensor of any element type.
pub fn tensor<T: Element>(values: Vec<T>, shape: &[usize]) -> Tensor {
    Tensor::new("tensor", values, shape).expect("shape")
}
