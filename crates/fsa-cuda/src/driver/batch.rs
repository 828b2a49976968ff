//! Sequence lengths on the device, as proof that they were checked.

use super::{Device, DeviceBuffer, DeviceSpan, Stream};
use crate::error::Result;
use fsa_core::Batch;
use std::sync::Arc;

/// The prefix sums of a batch in device memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceBatch<'a> {
    cu_seqlens_q: DeviceSpan<'a>,
    cu_seqlens_kv: DeviceSpan<'a>,
    sequences: usize,
    total_q: usize,
    total_kv: usize,
}

impl<'a> DeviceBatch<'a> {
    /// Prefix sums that lie on the device already.
    ///
    /// # Safety
    /// Both spans hold `sequences + 1` i32: prefix sums that start at 0, do not decrease and end at `total_q` and
    /// `total_kv`; no sequence has more query rows than keys.
    pub unsafe fn from_raw(
        cu_seqlens_q: DeviceSpan<'a>,
        cu_seqlens_kv: DeviceSpan<'a>,
        (sequences, total_q, total_kv): (usize, usize, usize),
    ) -> Self {
        Self { cu_seqlens_q, cu_seqlens_kv, sequences, total_q, total_kv }
    }

    /// `cu_seqlens_q`, then `cu_seqlens_kv`.
    pub(crate) fn spans(&self) -> [DeviceSpan<'a>; 2] {
        [self.cu_seqlens_q, self.cu_seqlens_kv]
    }

    /// Number of sequences, query rows and keys.
    pub fn sizes(&self) -> (usize, usize, usize) {
        (self.sequences, self.total_q, self.total_kv)
    }
}

/// A [`DeviceBatch`] with its memory, made from a checked [`Batch`].
#[derive(Debug)]
pub struct UploadedBatch {
    sums: [DeviceBuffer; 2],
    sizes: (usize, usize, usize),
}

impl UploadedBatch {
    /// Copies the prefix sums of `batch` to the device.
    pub fn new(device: &Arc<Device>, batch: &Batch, stream: &Stream) -> Result<Self> {
        let sums = |name: &str, end: fn(&fsa_core::Sequence) -> usize| {
            // A batch is made from i32 prefix sums or checked against them.
            let ends = batch.sequences().iter().map(|sequence| end(sequence) as i32);
            let host: Vec<i32> = std::iter::once(0).chain(ends).collect();
            let buffer = DeviceBuffer::new(device, name, host.len() * size_of::<i32>())?;
            buffer.upload(&host, stream)?;
            Ok(buffer)
        };
        Ok(Self {
            sums: [sums("cu_seqlens_q", |s| s.query_rows.end)?, sums("cu_seqlens_kv", |s| s.kv_rows.end)?],
            sizes: (batch.sequences().len(), batch.total_q(), batch.total_kv()),
        })
    }

    /// The prefix sums.
    pub fn get(&self) -> DeviceBatch<'_> {
        let [q, kv] = &self.sums;
        let (sequences, total_q, total_kv) = self.sizes;
        DeviceBatch { cu_seqlens_q: q.span(), cu_seqlens_kv: kv.span(), sequences, total_q, total_kv }
    }
}
