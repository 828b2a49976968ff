//! Graphs built node by node: what a call would give to its streams, written down without running it.
//!
//! Not by capturing a stream: while any stream of a context is captured, the driver refuses to synchronise that context from
//! whatever thread, so a library that captured on its own would break programs that have more than one.

use super::{Device, check, ignore};
use crate::error::Result;
use cudarc::driver::sys;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// First driver whose graphs know that a kernel may start before the one ahead of it has ended: CUDA 12.3.
const OVERLAPS_SINCE: (u32, u32) = (12, 3);

/// Nodes keep the priorities of their launches.
pub(super) const INSTANTIATE_FLAGS: u64 =
    sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY.0 as u64;

/// A graph under construction.
#[derive(Debug)]
struct Construction {
    device: Arc<Device>,
    raw: sys::CUgraph,
    /// The driver does not order calls that change one graph.
    adding: Mutex<()>,
}

// SAFETY: the driver's functions may be called from any thread; the handle names an object that lives until drop.
unsafe impl Send for Construction {}
// SAFETY: as above; what changes the graph holds the lock.
unsafe impl Sync for Construction {}

impl Drop for Construction {
    fn drop(&mut self) {
        if let Ok(_bound) = self.device.bind() {
            // SAFETY: `Recording::new` made it; instances keep what they need.
            ignore(unsafe { sys::cuGraphDestroy(self.raw) });
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    raw: sys::CUgraphNode,
    is_kernel: bool,
}

// SAFETY: the handle names a node of a graph that lives while a recording of it does; only recordings use it.
unsafe impl Send for Node {}

/// A stream that is written down: each node follows those that were last on it.
#[derive(Debug)]
pub(super) struct Recording {
    graph: Arc<Construction>,
    last: Mutex<Vec<Node>>,
}

impl Recording {
    /// The first stream of a new graph.
    pub(super) fn new(device: &Arc<Device>) -> Result<Self> {
        let _bound = device.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current, `raw` outlives the call, and 0 is the only flag.
        check("cuGraphCreate", unsafe { sys::cuGraphCreate(&mut raw, 0) })?;
        let graph = Arc::new(Construction { device: Arc::clone(device), raw, adding: Mutex::default() });
        Ok(Self { graph, last: Mutex::default() })
    }

    /// Another stream of the same graph, which follows nothing yet.
    pub(super) fn branch(&self) -> Self {
        Self { graph: Arc::clone(&self.graph), last: Mutex::default() }
    }

    fn last(&self) -> MutexGuard<'_, Vec<Node>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was last on this stream, as an event keeps it.
    pub(super) fn mark(&self) -> Vec<Node> {
        self.last().clone()
    }

    /// What follows on this stream waits for `mark`, too.
    pub(super) fn wait(&self, mark: &[Node]) {
        let mut last = self.last();
        for node in mark {
            // The driver refuses to be told of an edge twice.
            if last.iter().all(|known| known.raw != node.raw) {
                last.push(*node);
            }
        }
    }

    /// Adds a node that follows the last ones, by `add`, which is given their handles and their number.
    fn add(
        &self,
        call: &'static str,
        is_kernel: bool,
        add: impl FnOnce(&mut sys::CUgraphNode, sys::CUgraph, *const sys::CUgraphNode, usize) -> sys::CUresult,
    ) -> Result<()> {
        let mut last = self.last();
        let before: Vec<_> = last.iter().map(|node| node.raw).collect();
        let mut raw = std::ptr::null_mut();
        let _adding = self.graph.adding.lock().unwrap_or_else(PoisonError::into_inner);
        check(call, add(&mut raw, self.graph.raw, before.as_ptr(), before.len()))?;
        *last = vec![Node { raw, is_kernel }];
        Ok(())
    }

    /// Writes down a kernel. With `overlaps` it may start before the kernels that it follows have ended, if it follows nothing else. A
    /// `priority` other than 0 is that of its node.
    ///
    /// # Safety
    /// The grid and `argument` are what the kernel takes, as at a launch.
    pub(super) unsafe fn kernel(
        &self,
        launch: &Launch,
        argument: *mut c_void,
        overlaps: bool,
        priority: i32,
    ) -> Result<()> {
        let Launch { function, grid: [x, y, z], threads, smem_bytes } = *launch;
        let mut arguments = argument;
        let params = sys::CUDA_KERNEL_NODE_PARAMS {
            func: function,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: smem_bytes,
            kernelParams: &mut arguments,
            extra: std::ptr::null_mut(),
            kern: std::ptr::null_mut(),
            ctx: std::ptr::null_mut(),
        };
        let follows_kernels = |last: &[Node]| !last.is_empty() && last.iter().all(|node| node.is_kernel);
        let knows = self.graph.device.facts().driver >= OVERLAPS_SINCE;
        let overlaps = overlaps && knows && follows_kernels(&self.last());
        self.add("cuGraphAddKernelNode", true, |node, graph, ahead, number| {
            let (before, count) = if overlaps { (std::ptr::null(), 0) } else { (ahead, number) };
            // SAFETY: `before` holds `count` nodes of `graph`; the driver copies parameters and argument.
            let mut status = unsafe { sys::cuGraphAddKernelNode_v2(node, graph, before, count, &params) };
            if priority != 0 && status == sys::CUresult::CUDA_SUCCESS {
                let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PRIORITY;
                // SAFETY: the node was just made, and is a kernel; the driver copies the value.
                status =
                    unsafe { sys::cuGraphKernelNodeSetAttribute(*node, id, &sys::CUlaunchAttributeValue { priority }) };
            }
            if !overlaps || status != sys::CUresult::CUDA_SUCCESS {
                return status;
            }
            let edge = sys::CUgraphEdgeData {
                from_port: sys::CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC as u8,
                to_port: 0,
                type_: sys::CUgraphDependencyType::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8,
                reserved: [0; 5],
            };
            let (nodes, edges) = (vec![*node; number], vec![edge; number]);
            // SAFETY: `ahead` and the others hold `number` nodes of `graph`, all kernels, and edges; the driver is new enough to have the
            // function.
            unsafe { sys::cuGraphAddDependencies_v2(graph, ahead, nodes.as_ptr(), edges.as_ptr(), number) }
        })
    }

    /// Writes down that every byte of some memory is set.
    ///
    /// # Safety
    /// `address` and `bytes` name memory of the device, as at a launch.
    pub(super) unsafe fn fill(&self, address: u64, byte: u8, bytes: usize) -> Result<()> {
        // Words where it can be: one row of them has room for 16 GiB.
        let size = if address.is_multiple_of(4) && bytes.is_multiple_of(4) { 4 } else { 1 };
        let params = sys::CUDA_MEMSET_NODE_PARAMS {
            dst: address,
            pitch: bytes,
            value: if size == 4 { u32::from_ne_bytes([byte; 4]) } else { byte.into() },
            elementSize: size as u32,
            width: bytes / size,
            height: 1,
        };
        let context = self.graph.device.context();
        self.add("cuGraphAddMemsetNode", false, |node, graph, before, count| {
            // SAFETY: `before` holds `count` nodes of `graph`; the driver copies the parameters; the context lives.
            unsafe { sys::cuGraphAddMemsetNode(node, graph, before, count, &params, context) }
        })
    }

    /// An instance of all that was written down.
    pub(super) fn instantiate(&self) -> Result<sys::CUgraphExec> {
        let _bound = self.graph.device.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the graph lives while `self` does, and `raw` outlives the call.
        check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut raw, self.graph.raw, INSTANTIATE_FLAGS)
        })?;
        Ok(raw)
    }
}

/// A kernel and its extent.
pub(super) struct Launch {
    pub function: sys::CUfunction,
    pub grid: [u32; 3],
    pub threads: u32,
    pub smem_bytes: u32,
}
