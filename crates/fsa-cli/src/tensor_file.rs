//! Tensors in safetensors files, with the project's element types and error messages.

use crate::failure::{Failure, Outcome};
use crate::whole_file::WholeFile;
use fsa::{DType, Storage, Tensor, bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Largest header that is read: the limit of the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open file. Only its header has been read.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl TensorFile {
    /// Reads and checks the header.
    pub fn open(path: &Path) -> Outcome<Self> {
        let mut file = File::open(path).map_err(Failure::file(path, "cannot be read"))?;
        let length = file.metadata().map_err(Failure::file(path, "cannot be read"))?.len();
        let wrong = |got: String| Failure::misuse(path.display().to_string(), "a safetensors file", got);
        if length < 8 {
            return Err(wrong(format!("{length} bytes, too few for a header")));
        }
        let mut size = [0u8; 8];
        file.read_exact(&mut size).map_err(Failure::file(path, "cannot be read"))?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER_BYTES.min(length - 8) {
            return Err(wrong(format!("a header length of {size} in a file of {length} bytes")));
        }
        let mut header = vec![0u8; size as usize];
        file.read_exact(&mut header).map_err(Failure::file(path, "cannot be read"))?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| wrong(format!("a header that does not parse: {error}")))?;
        let data_start = 8 + size;
        if data_start + metadata.data_len() as u64 != length {
            let (promised, present) = (metadata.data_len(), length - data_start);
            return Err(wrong(format!("{present} bytes of data where the header promises {promised}")));
        }
        Ok(Self { path: path.to_path_buf(), file, metadata, data_start })
    }

    /// True if there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    fn info(&self, name: &str) -> Outcome<TensorInfo> {
        self.metadata.info(name).cloned().ok_or_else(|| {
            let mut names = self.metadata.offset_keys();
            names.sort();
            let got = if names.is_empty() { "no tensor at all".to_string() } else { names.join(", ") };
            Failure::misuse(name, format!("a tensor of that name in {}", self.path.display()), got)
        })
    }

    /// Reads a tensor of floats or 32-bit integers.
    pub fn read(&mut self, name: &str) -> Outcome<Tensor> {
        let info = self.info(name)?;
        let shape = info.shape.clone();
        let tensor = match info.dtype {
            Dtype::F32 => Tensor::new(name, self.elements::<f32>(name, &info)?, &shape)?,
            Dtype::BF16 => Tensor::new(name, self.elements::<bf16>(name, &info)?, &shape)?,
            Dtype::F16 => Tensor::new(name, self.elements::<f16>(name, &info)?, &shape)?,
            Dtype::I32 => Tensor::new(name, self.elements::<i32>(name, &info)?, &shape)?,
            other => return Err(Failure::misuse(name, "dtype f32, bf16, f16 or i32", format!("dtype {other:?}"))),
        };
        Ok(tensor)
    }

    /// Reads a tensor if there is one.
    pub fn read_optional(&mut self, name: &str) -> Outcome<Option<Tensor>> {
        if self.has(name) { self.read(name).map(Some) } else { Ok(None) }
    }

    /// Reads a tensor of integers. 64-bit integers, the default of array libraries, are accepted when they fit.
    pub fn read_integers(&mut self, name: &str) -> Outcome<Tensor> {
        let info = self.info(name)?;
        let data = match info.dtype {
            Dtype::I32 => self.elements::<i32>(name, &info)?,
            Dtype::I64 => {
                let narrow = |wide: &i64| {
                    i32::try_from(*wide).map_err(|_| Failure::misuse(name, "integers of 32 bits", wide.to_string()))
                };
                self.elements::<i64>(name, &info)?.iter().map(narrow).collect::<Outcome<Vec<_>>>()?
            }
            other => return Err(Failure::misuse(name, "dtype i32 or i64", format!("dtype {other:?}"))),
        };
        Ok(Tensor::new(name, data, &info.shape)?)
    }

    fn elements<T: bytemuck::Pod>(&mut self, name: &str, info: &TensorInfo) -> Outcome<Vec<T>> {
        let (start, end) = info.data_offsets;
        let bytes = end - start;
        let mut data: Vec<T> = Vec::new();
        let len = bytes / size_of::<T>();
        let refused = |_| fsa::Error::OutOfMemory { what: name.to_string(), bytes };
        data.try_reserve_exact(len).map_err(refused)?;
        data.resize(len, T::zeroed());
        let failed = Failure::file(&self.path, "cannot be read");
        let target = bytemuck::cast_slice_mut(&mut data);
        self.file
            .seek(SeekFrom::Start(self.data_start + start as u64))
            .and_then(|_| self.file.read_exact(target))
            .map_err(failed)?;
        Ok(data)
    }
}

/// A tensor as the format's library wants it.
struct Stored<'a>(&'a Tensor);

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self.0.dtype() {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::I32 => Dtype::I32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(match self.0.storage() {
            Storage::F32(data) => bytemuck::cast_slice(data),
            Storage::Bf16(data) => bytemuck::cast_slice(data),
            Storage::F16(data) => bytemuck::cast_slice(data),
            Storage::I32(data) => bytemuck::cast_slice(data),
        })
    }

    fn data_len(&self) -> usize {
        self.0.size_bytes()
    }
}

/// Writes named tensors and notes about them.
pub fn write(file: WholeFile, tensors: &[(String, Tensor)], notes: HashMap<String, String>) -> Outcome {
    let entries = tensors.iter().map(|(name, tensor)| (name.as_str(), Stored(tensor)));
    safetensors::serialize_to_file(entries, Some(notes), file.path()).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => Failure::file(file.path(), "cannot be written")(source),
        other => Failure::Check(format!("the result cannot be written as safetensors: {other}")),
    })?;
    file.finish()
}
