//! The prefix sums of a batch that kernels look sequences up in: which of them a call needs, and where they lie.

use super::{Slot, Windows, Workspace};
use crate::driver::{Address, DeviceBatch, DeviceSpan};
use crate::params::BatchTables;
use serde::Serialize;

/// Which prefix sums a call needs. Equal needs share their tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct TableSpec {
    /// Compressed keys of every sequence.
    pub windows: Option<Windows>,
    /// Tiles of rows: tokens of a tile.
    pub tile_tokens: Option<usize>,
    /// Tiles of keys: keys of a tile. The keys are the compressed ones where there are windows, else the tokens.
    pub tile_keys: Option<usize>,
}

/// Where the tables lie in the workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct TablePlan {
    spec: TableSpec,
    sequences: usize,
    compressed: Option<Slot>,
    tiles: Option<Slot>,
    key_tiles: Option<Slot>,
}

/// Addresses of the tables; 0 where there is none.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tables {
    pub cu_compressed: Address,
    pub tile_base: Address,
    pub key_tile_base: Address,
}

impl TablePlan {
    pub(crate) fn new(spec: TableSpec, sequences: usize, workspace: &mut Workspace) -> Self {
        let bytes = (sequences + 1) * size_of::<i32>();
        let mut add = |name, wanted: bool| wanted.then(|| workspace.add(name, bytes));
        Self {
            spec,
            sequences,
            compressed: add("cu_compressed", spec.windows.is_some()),
            tiles: add("tile_base", spec.tile_tokens.is_some()),
            key_tiles: add("key_tile_base", spec.tile_keys.is_some()),
        }
    }

    /// Which they are.
    pub(crate) fn spec(&self) -> TableSpec {
        self.spec
    }

    /// The tables of a call.
    pub(crate) fn tables(&self, workspace: &DeviceSpan<'_>) -> Tables {
        let address = |slot: Option<Slot>| slot.map_or(Address::default(), |slot| slot.address(workspace));
        Tables {
            cu_compressed: address(self.compressed),
            tile_base: address(self.tiles),
            key_tile_base: address(self.key_tiles),
        }
    }

    /// Prefix sums of the compressed keys, where there are such.
    pub(crate) fn compressed<'a>(&self, workspace: &DeviceSpan<'a>) -> DeviceSpan<'a> {
        self.compressed.unwrap_or_default().span(workspace)
    }

    /// What fills them.
    pub(crate) fn params(&self, batch: &DeviceBatch<'_>, workspace: &DeviceSpan<'_>) -> BatchTables {
        let [cu_seqlens_q, cu_seqlens_kv] = batch.spans().map(|span| span.address());
        let Tables { cu_compressed, tile_base, key_tile_base } = self.tables(workspace);
        let windows = self.spec.windows.unwrap_or(Windows { kernel_size: 1, kernel_stride: 1 });
        BatchTables {
            cu_seqlens_q,
            cu_seqlens_kv,
            cu_compressed,
            tile_base,
            key_tile_base,
            cleared: [Address::default(); 6],
            batch: self.sequences as i32,
            kernel_size: windows.kernel_size as i32,
            kernel_stride: windows.kernel_stride as i32,
            tile_tokens: self.spec.tile_tokens.unwrap_or(1) as i32,
            tile_keys: self.spec.tile_keys.unwrap_or(1) as i32,
            compressed: self.spec.windows.is_some().into(),
        }
    }
}
