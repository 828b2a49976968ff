//! The kernels of a device: compiled or read from the cache on first use, loaded once.

use crate::arch::KernelSet;
use crate::attend::AttendKernel;
use crate::backward::BackwardKernels;
use crate::band::BandKernel;
use crate::band_backward::BandBackwardKernels;
use crate::band_pair::BandPairKernel;
use crate::band_select::BandSelectKernel;
use crate::block_mask::BlockMaskKernel;
use crate::combine::CombineKernels;
use crate::compress::CompressKernels;
use crate::compress_linear::CompressLinearKernels;
use crate::driver::{Device, Module, Replays};
use crate::environment::Environment;
use crate::error::Result as CudaResult;
use crate::index::IndexKernels;
use crate::jit::Compiler;
use crate::kept::Kept;
use crate::lanes::Lanes;
use crate::measured::MeasuredRoutes;
use crate::plan::{
    BackwardPlan, ForwardPlan, Pass, PlanOptions, Problem, Routing, SelectedBackwardPlan, SelectedPlan, Sizes,
};
use crate::prepare::PrepareKernel;
use crate::reduce::ReduceKernel;
use crate::rope::RopeKernel;
use crate::select::SelectKernel;
use crate::source::{Kernel, QuerySums, Specialisation};
use fsa_core::Result;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::ScopedJoinHandle;

/// Declares the loaded kernel files: variant, host type of the file.
macro_rules! loaded {
    ($($kernel:ident($host:ty),)*) => {
        /// A loaded kernel file.
        #[derive(Debug, Clone)]
        pub(crate) enum Loaded {
            $($kernel(Arc<$host>),)*
        }

        impl Loaded {
            fn new(module: &Arc<Module>, specialisation: &Specialisation) -> CudaResult<Self> {
                Ok(match specialisation.kernel {
                    $(Kernel::$kernel => Self::$kernel(Arc::new(<$host>::load(module, specialisation)?)),)*
                })
            }
        }

        $(impl LoadedAs for $host {
            fn of(loaded: &Loaded) -> Option<&Arc<Self>> {
                if let Loaded::$kernel(kernel) = loaded { Some(kernel) } else { None }
            }
        })*
    };
}

/// The host type of a kernel file.
pub(crate) trait LoadedAs: Sized {
    /// The kernels, if they are of this type.
    fn of(loaded: &Loaded) -> Option<&Arc<Self>>;
}

loaded! {
    Index(IndexKernels),
    Attend(AttendKernel),
    Reduce(ReduceKernel),
    Backward(BackwardKernels),
    Prepare(PrepareKernel),
    Band(BandKernel),
    BandPair(BandPairKernel),
    BandBackward(BandBackwardKernels),
    BlockMask(BlockMaskKernel),
    Select(SelectKernel),
    BandSelect(BandSelectKernel),
    Compress(CompressKernels),
    CompressLinear(CompressLinearKernels),
    Rope(RopeKernel),
    Combine(CombineKernels),
}

/// Plans of stage `selected` and their calls, so that a call that comes again costs the host no more where it is planned anew.
#[derive(Debug, Default)]
pub(crate) struct SelectedCalls {
    pub(crate) forward_plans: Kept<(Problem, PlanOptions), SelectedPlan>,
    pub(crate) backward_plans: Kept<(Problem, PlanOptions), SelectedBackwardPlan>,
    pub(crate) forward: Kept<ForwardPlan, Replays>,
    pub(crate) backward: Kept<BackwardPlan, Replays>,
}

/// A device, its compiler, and what was loaded so far.
#[derive(Debug)]
pub struct Kernels {
    /// Before what is loaded: recorded calls are dropped before the kernels that they name.
    selected_calls: SelectedCalls,
    device: Arc<Device>,
    compiler: Compiler,
    set: KernelSet,
    loaded: RwLock<HashMap<Specialisation, Loaded>>,
    lanes: Lanes,
    sides: Lanes,
    routing: Routing,
    query_sums: Option<QuerySums>,
    one_pass: Option<bool>,
    measured: MeasuredRoutes,
}

impl Kernels {
    /// Opens the device that the environment names.
    ///
    /// # Errors
    /// No driver or device, or one that is too old. NVRTC is looked for when a kernel is not in the cache.
    pub fn open(environment: &Environment) -> Result<Arc<Self>> {
        let device = Device::open(environment.device)?;
        let own = device.facts().arch.kernels();
        // Kernels for newer devices than this one cannot be had; older ones can.
        let set = environment.kernels.map_or(own, |asked| asked.min(own));
        let (lanes, sides) = (Lanes::new(&device)?, Lanes::new(&device)?);
        let compiler = Compiler::new(environment);
        let measured = MeasuredRoutes::new(environment.cache_dir.clone(), &device.facts().name, set);
        let Environment { routing, query_sums, one_pass, .. } = *environment;
        Ok(Arc::new(Self {
            device,
            compiler,
            set,
            loaded: RwLock::default(),
            lanes,
            sides,
            selected_calls: SelectedCalls::default(),
            routing,
            query_sums,
            one_pass,
            measured,
        }))
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The compiler and its cache.
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// Which kernels are used: the device's own, or older ones that were asked for.
    pub fn set(&self) -> KernelSet {
        self.set
    }

    /// Times of the routes of stage `selected` that were measured on this machine.
    pub fn measured(&self) -> &MeasuredRoutes {
        &self.measured
    }

    /// Who chooses the route of a call.
    pub fn routing(&self) -> Routing {
        self.routing
    }

    /// The options with what the environment asks for, unless they say otherwise.
    pub(crate) fn query_sums(&self, options: &PlanOptions) -> PlanOptions {
        PlanOptions { query_sums: options.query_sums.or(self.query_sums), ..*options }
    }

    /// The same for compressed attention and the lists.
    pub(crate) fn one_pass(&self, sizes: &Sizes, options: &PlanOptions) -> PlanOptions {
        let asked = self.one_pass.or_else(|| self.routing.one_pass(sizes));
        PlanOptions { one_pass: options.one_pass.or(asked), ..*options }
    }

    /// The options of a pass of stage `selected` with what the environment asks for, and the route that was measured to be faster,
    /// unless they say otherwise.
    pub(crate) fn routed(&self, problem: &Problem, pass: Pass, options: &PlanOptions) -> PlanOptions {
        let options = self.asked(problem, options);
        let measured = || self.measured.get(problem, pass).map(|times| times.faster());
        PlanOptions { route: options.route.or_else(measured), ..options }
    }

    /// The same without what was measured.
    pub(crate) fn asked(&self, problem: &Problem, options: &PlanOptions) -> PlanOptions {
        let options = self.one_pass(&problem.sizes(), &self.query_sums(options));
        PlanOptions { route: options.route.or_else(|| self.routing.route(problem)), ..options }
    }

    pub(crate) fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    /// Streams beside those of [`lanes`](Self::lanes), for a stage that runs beside one that has these. A call takes them first.
    pub(crate) fn sides(&self) -> &Lanes {
        &self.sides
    }

    /// Plans and calls of stage `selected`.
    pub(crate) fn selected_calls(&self) -> &SelectedCalls {
        &self.selected_calls
    }

    fn find(&self, specialisation: &Specialisation) -> Option<Loaded> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).get(specialisation).cloned()
    }

    /// The kernels of `specialisations`, in their order. What is not loaded is compiled side by side.
    pub(crate) fn get(&self, specialisations: &[Specialisation]) -> Result<Vec<Loaded>> {
        let found: Option<Vec<Loaded>> =
            specialisations.iter().map(|specialisation| self.find(specialisation)).collect();
        if let Some(found) = found {
            return Ok(found);
        }
        std::thread::scope(|scope| {
            let start = |specialisation| scope.spawn(move || self.load(specialisation));
            let threads: Vec<_> = specialisations.iter().map(start).collect();
            let join = |thread: ScopedJoinHandle<'_, Result<Loaded>>| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            threads.into_iter().map(join).collect()
        })
    }

    /// The kernels of one specialisation, as the host type of its file.
    pub(crate) fn one<K: LoadedAs>(&self, specialisation: &Specialisation) -> Result<Arc<K>> {
        let loaded = self.load(specialisation)?;
        match K::of(&loaded) {
            Some(kernels) => Ok(Arc::clone(kernels)),
            None => unreachable!("{specialisation} is of another file"),
        }
    }

    fn load(&self, specialisation: &Specialisation) -> Result<Loaded> {
        if let Some(loaded) = self.find(specialisation) {
            return Ok(loaded);
        }
        let cubin = self.compiler.cubin(specialisation, self.device.facts().arch)?;
        let loaded = Loaded::new(&Module::load(&self.device, &cubin.image)?, specialisation)?;
        // Another thread may have been faster: everyone gets the first.
        let mut all = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        Ok(all.entry(*specialisation).or_insert(loaded).clone())
    }
}
