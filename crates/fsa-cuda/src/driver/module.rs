//! Loaded modules, their kernels, and the launch.

use super::device::OutsideCaptures;
use super::recording::Launch;
use super::{Device, DeviceBuffer, Stream, check, ignore};
use crate::error::Result;
use cudarc::driver::sys;
use std::ffi::{CString, c_int, c_void};
use std::marker::PhantomData;
use std::sync::Arc;
use sys::CUfunction_attribute as Attribute;

/// A parameter struct that Rust and a kernel share, `repr(C)`. Two facts make a launch sound: the generated
/// translation unit asserts size and offsets of the struct (`crate::params`), and the addresses in its values come
/// from spans that are large enough for what the kernel does with them, which the stage's host file checks.
pub(crate) trait KernelParams: Copy {}

/// A loaded module: the kernels of one compiled file.
#[derive(Debug)]
pub struct Module {
    device: Arc<Device>,
    raw: sys::CUmodule,
}

// SAFETY: the driver's functions may be called from any thread; the handle names an object that lives until drop.
unsafe impl Send for Module {}
// SAFETY: as above; nothing here is mutable.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin as the compiler made it.
    pub(crate) fn load(device: &Arc<Device>, cubin: &[u8]) -> Result<Arc<Self>> {
        let _bound = device.bind()?;
        let _outside = OutsideCaptures::enter();
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; a cubin is an ELF image that carries its own size, and the driver copies it.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut raw, cubin.as_ptr().cast()) })?;
        Ok(Arc::new(Self { device: Arc::clone(device), raw }))
    }

    /// The kernel `name`, which may use all the shared memory that the device gives to a CTA.
    ///
    /// That the kernel takes `P` is asserted by the translation unit from which the module was compiled.
    pub(crate) fn function<P: KernelParams>(self: &Arc<Self>, name: &str) -> Result<Function<P>> {
        let _bound = self.device.bind()?;
        let mut raw = std::ptr::null_mut();
        let text = CString::new(name).unwrap_or_default();
        // SAFETY: the module is loaded, the name terminated, and `raw` outlives the call.
        check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut raw, self.raw, text.as_ptr()) })?;
        let mut fixed_bytes = 0;
        let fixed = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: `raw` is a kernel of the module, and the number outlives the call.
        check("cuFuncGetAttribute", unsafe { sys::cuFuncGetAttribute(&mut fixed_bytes, fixed, raw) })?;
        let most = c_int::try_from(self.device.facts().smem_per_cta_bytes).unwrap_or(c_int::MAX) - fixed_bytes;
        let dynamic = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as above.
        check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(raw, dynamic, most) })?;
        Ok(Function { module: Arc::clone(self), raw, params: PhantomData })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Ok(_bound) = self.device.bind() {
            // What was launched must end before its code goes. To free memory waits for that, and leaves captures of other threads whole; to wait
            // for the context does not.
            match DeviceBuffer::new(&self.device, "a byte to free", 1) {
                Ok(byte) => drop(byte),
                // SAFETY: the context is current.
                Err(_) => ignore(unsafe { sys::cuCtxSynchronize() }),
            }
            let _outside = OutsideCaptures::enter();
            // SAFETY: the context is current, `load` loaded it, and every kernel of it holds an `Arc` of it.
            ignore(unsafe { sys::cuModuleUnload(self.raw) });
        }
    }
}

/// Priority of a launch that goes ahead; the least is 0 everywhere, and the lower the number, the higher the priority.
const AHEAD: i32 = -1;

/// Extent of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaunchDims {
    /// CTAs; y and z are at most 65,535.
    pub grid: [u32; 3],
    /// Threads of a CTA.
    pub threads: u32,
    /// Dynamic shared memory of a CTA.
    pub smem_bytes: u32,
    /// The kernel may start before the one ahead of it in the stream has ended (programmatic dependent launch): both
    /// order themselves (`let_next_start`, `wait_for_previous` in `ptx/memory.cuh`). Hopper and later.
    pub overlaps: bool,
}

/// A kernel that takes a `P`.
#[derive(Debug)]
pub(crate) struct Function<P> {
    module: Arc<Module>,
    raw: sys::CUfunction,
    params: PhantomData<fn(&P)>,
}

// SAFETY: the handle names a kernel of the module, which lives as long.
unsafe impl<P> Send for Function<P> {}
// SAFETY: as above; nothing here is mutable.
unsafe impl<P> Sync for Function<P> {}

impl<P: KernelParams> Function<P> {
    /// Gives the kernel to `stream`; an empty grid gives nothing. The context of the device must be current.
    pub(crate) fn launch(&self, stream: &Stream, dims: LaunchDims, params: &P) -> Result<()> {
        self.launch_with(stream, dims, params, 0)
    }

    /// The same; its CTAs go ahead of those of other streams that still wait for a multiprocessor.
    pub(crate) fn launch_ahead(&self, stream: &Stream, dims: LaunchDims, params: &P) -> Result<()> {
        self.launch_with(stream, dims, params, AHEAD)
    }

    fn launch_with(&self, stream: &Stream, dims: LaunchDims, params: &P, priority: i32) -> Result<()> {
        debug_assert!(Arc::ptr_eq(stream.device(), &self.module.device), "a stream of the kernel's device");
        let LaunchDims { grid: [x, y, z], threads, smem_bytes, overlaps } = dims;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let mut argument: *mut c_void = std::ptr::from_ref(params).cast_mut().cast();
        if let Some(recording) = stream.recording() {
            let launch = Launch { function: self.raw, grid: dims.grid, threads, smem_bytes };
            // SAFETY: as for the launch below.
            return unsafe { recording.kernel(&launch, argument, overlaps, priority) };
        }
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let overlapping = attribute(
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        );
        let ahead =
            attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PRIORITY, sys::CUlaunchAttributeValue { priority });
        // Those that are asked for come first.
        let mut attributes = if overlaps { [overlapping, ahead] } else { [ahead, overlapping] };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: smem_bytes,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(overlaps) + u32::from(priority != 0),
        };
        // SAFETY: the kernel takes one `P`, which its translation unit asserts by name, size and offsets; the driver
        // copies it and the configuration before it returns. The addresses in it are spans whose sizes the plan of the
        // stage checked.
        check("cuLaunchKernelEx", unsafe {
            sys::cuLaunchKernelEx(&config, self.raw, &mut argument, std::ptr::null_mut())
        })
    }
}
