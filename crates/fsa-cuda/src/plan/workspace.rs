//! The workspace: named regions of one piece of memory that the caller owns.

use crate::driver::{Address, DeviceSpan};
use serde::Serialize;
use std::fmt;

/// Regions start at multiples of this: a line of L2, and more than any vector access.
const ALIGNMENT: usize = 256;

/// A region: where it starts and how large it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Slot {
    /// Bytes from the start of the workspace.
    pub offset: usize,
    /// Its size.
    pub bytes: usize,
}

impl Slot {
    /// Its memory in `workspace`.
    pub(crate) fn span<'a>(&self, workspace: &DeviceSpan<'a>) -> DeviceSpan<'a> {
        workspace.part(self.offset, self.bytes)
    }

    /// Its address in `workspace`.
    pub(crate) fn address(&self, workspace: &DeviceSpan<'_>) -> Address {
        workspace.address().offset(self.offset)
    }
}

/// The regions in order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Workspace {
    regions: Vec<(&'static str, Slot)>,
    bytes: usize,
}

impl Workspace {
    /// Appends a region.
    pub(super) fn add(&mut self, name: &'static str, bytes: usize) -> Slot {
        let slot = Slot { offset: self.bytes, bytes };
        self.bytes = (self.bytes + bytes).next_multiple_of(ALIGNMENT);
        self.regions.push((name, slot));
        slot
    }

    /// Size of the whole.
    pub fn size_bytes(&self) -> usize {
        self.bytes
    }

    /// Name and place of every region.
    pub fn regions(&self) -> &[(&'static str, Slot)] {
        &self.regions
    }

    /// Checks memory that is to be the workspace.
    pub(crate) fn check(&self, memory: &DeviceSpan<'_>) -> fsa_core::Result<()> {
        if memory.size_bytes() < self.bytes {
            let got = format!("{} bytes", memory.size_bytes());
            return Err(fsa_core::Error::input("workspace", format!("{} bytes", self.bytes), got));
        }
        if !memory.address().0.is_multiple_of(ALIGNMENT as u64) {
            let got = format!("{:#x}", memory.address().0);
            return Err(fsa_core::Error::input(
                "workspace",
                format!("an address that is a multiple of {ALIGNMENT}"),
                got,
            ));
        }
        Ok(())
    }
}

impl fmt::Display for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        write!(f, "{:.1} MiB scratch:", mebibytes(self.bytes))?;
        for (name, slot) in &self.regions {
            if slot.bytes >= 1 << 20 {
                write!(f, " {name} {:.1}", mebibytes(slot.bytes))?;
            }
        }
        Ok(())
    }
}
