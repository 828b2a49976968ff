//! Kernels per device and plans per call, made once and kept.

use crate::memory::device::Place;
use fsa::cuda::plan::{BandProblem, CompressProblem, NsaProblem, PlanOptions, Problem, SelectProblem};
use fsa::cuda::selected::{SelectedBackward, SelectedForward};
use fsa::cuda::stages::{
    BandBackward, BandForward, CompressBackward, CompressForward, NsaBackward, NsaForward, Select,
};
use fsa::cuda::{Environment, Kernels};
use fsa::{Error, Result, Rope};
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// A rotary embedding as a key: the bits of its numbers, and the elements of a vector that it turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    pub numbers: Vec<u64>,
    pub dim: usize,
}

impl Rotation {
    /// `numbers` as [`crate::packed::rope`] takes them; none without an embedding.
    pub fn new(numbers: &[f64], dim: usize) -> Option<Self> {
        (!numbers.is_empty()).then(|| Self { numbers: numbers.iter().map(|number| number.to_bits()).collect(), dim })
    }

    /// The embedding.
    ///
    /// # Errors
    /// There are more or fewer numbers than one has.
    pub fn rope(&self) -> Result<Option<Rope>> {
        crate::packed::rope(&self.numbers.iter().map(|bits| f64::from_bits(*bits)).collect::<Vec<_>>())
    }
}

/// What a call computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    Selected(Problem),
    SelectedBackward { problem: Problem, deterministic: bool },
    Band(BandProblem),
    BandBackward { problem: BandProblem, deterministic: bool },
    Select(SelectProblem),
    Compress(CompressProblem),
    CompressBackward(CompressProblem),
    Nsa { problem: NsaProblem, rotation: Option<Rotation>, saves: bool },
    NsaBackward { problem: NsaProblem, rotation: Option<Rotation>, deterministic: bool },
}

/// What a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub place: Place,
    pub work: Work,
}

/// Calls that differ in more than this are told apart by comparing them: there are few.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Place { ordinal, sizes } = self.place;
        (ordinal, sizes.total_q, sizes.total_kv, sizes.num_q_heads, sizes.num_kv_heads, sizes.head_dim).hash(state);
        std::mem::discriminant(&self.work).hash(state);
    }
}

/// A plan with its kernels.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one for a plan, and it lies behind an `Arc`")]
pub enum Launch {
    Selected(SelectedForward),
    SelectedBackward(SelectedBackward),
    Band(BandForward),
    BandBackward(BandBackward),
    Select(Select),
    Compress(CompressForward),
    CompressBackward(CompressBackward),
    Nsa(NsaForward),
    NsaBackward(NsaBackward),
}

/// A plan and where it is for.
#[derive(Debug)]
pub struct Planned {
    pub key: Key,
    pub kernels: Arc<Kernels>,
    pub launch: Launch,
}

impl Planned {
    /// Where the call runs, and its sizes.
    pub fn place(&self) -> &Place {
        &self.key.place
    }

    /// Size of the workspace of a launch.
    pub fn workspace_bytes(&self) -> usize {
        match &self.launch {
            Launch::Selected(plan) => plan.workspace_bytes(),
            Launch::SelectedBackward(plan) => plan.workspace_bytes(),
            Launch::Band(plan) => plan.workspace_bytes(),
            Launch::BandBackward(plan) => plan.workspace_bytes(),
            Launch::Select(plan) => plan.workspace_bytes(),
            Launch::Compress(plan) => plan.workspace_bytes(),
            Launch::CompressBackward(plan) => plan.workspace_bytes(),
            Launch::Nsa(plan) => plan.workspace_bytes(),
            Launch::NsaBackward(plan) => plan.workspace_bytes(),
        }
    }

    /// Keys of an attention stage; compressed ones are as many as there is room for.
    pub fn total_keys(&self) -> usize {
        match &self.key.work {
            Work::Band(problem) | Work::BandBackward { problem, .. } => problem.total_keys(),
            _ => self.place().sizes.total_kv,
        }
    }

    /// The error of a call that is given a plan of another one.
    pub fn other(&self, expected: &str) -> Error {
        Error::input("plan", format!("one of {expected}"), format!("{:?}", self.key.work))
    }
}

/// Plans that are kept. Where lengths change from call to call, old ones are of no use: all are dropped at once.
const MAX_PLANS: usize = 1024;

/// Folders below an entry of `sys.path` in which pip puts NVRTC: CUDA 13 and later, and before.
const PIP_FOLDERS: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];

static KERNELS: LazyLock<Mutex<HashMap<usize, Arc<Kernels>>>> = LazyLock::new(Mutex::default);
static PLANS: LazyLock<Mutex<HashMap<Key, Arc<Planned>>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A plan that was made before.
pub fn find(key: &Key) -> Option<Arc<Planned>> {
    lock(&PLANS).get(key).cloned()
}

/// Makes a plan; loads kernels, and compiles those that are not in the cache on disk. `python_path` is `sys.path`.
///
/// # Errors
/// What the device lacks, or what the kernels do not support.
pub fn make(key: &Key, python_path: &[PathBuf]) -> Result<Arc<Planned>> {
    let kernels = kernels(key.place.ordinal, python_path)?;
    let launch = plan(&kernels, &key.work)?;
    let planned = Arc::new(Planned { key: key.clone(), kernels, launch });
    let mut plans = lock(&PLANS);
    if plans.len() >= MAX_PLANS {
        plans.clear();
    }
    Ok(plans.entry(key.clone()).or_insert(planned).clone())
}

fn plan(kernels: &Arc<Kernels>, work: &Work) -> Result<Launch> {
    let options = |deterministic: &bool| PlanOptions { deterministic: *deterministic, ..PlanOptions::default() };
    let rope = |rotation: &Option<Rotation>| -> Result<Option<(Rope, usize)>> {
        let Some(rotation) = rotation else { return Ok(None) };
        Ok(rotation.rope()?.map(|rope| (rope, rotation.dim)))
    };
    Ok(match work {
        Work::Selected(problem) => Launch::Selected(SelectedForward::plan(kernels, problem, &PlanOptions::default())?),
        Work::SelectedBackward { problem, deterministic } => {
            Launch::SelectedBackward(SelectedBackward::plan(kernels, problem, &options(deterministic))?)
        }
        Work::Band(problem) => Launch::Band(BandForward::plan(kernels, problem)?),
        Work::BandBackward { problem, deterministic } => {
            Launch::BandBackward(BandBackward::plan(kernels, problem, &options(deterministic))?)
        }
        Work::Select(problem) => Launch::Select(Select::plan(kernels, problem, &PlanOptions::default())?),
        Work::Compress(problem) => Launch::Compress(CompressForward::plan(kernels, problem)?),
        Work::CompressBackward(problem) => Launch::CompressBackward(CompressBackward::plan(kernels, problem)?),
        Work::Nsa { problem, rotation, saves } => {
            let rope = rope(rotation)?;
            let rope = rope.as_ref().map(|(rope, dim)| (rope, *dim));
            let options = PlanOptions::default();
            Launch::Nsa(NsaForward::plan(kernels, problem, rope, &options, *saves)?)
        }
        Work::NsaBackward { problem, rotation, deterministic } => {
            let rope = rope(rotation)?;
            let rope = rope.as_ref().map(|(rope, dim)| (rope, *dim));
            Launch::NsaBackward(NsaBackward::plan(kernels, problem, rope, &options(deterministic))?)
        }
    })
}

fn kernels(ordinal: usize, python_path: &[PathBuf]) -> Result<Arc<Kernels>> {
    let mut all = lock(&KERNELS);
    if let Some(kernels) = all.get(&ordinal) {
        return Ok(Arc::clone(kernels));
    }
    let mut environment = Environment { device: ordinal, ..Environment::read()? };
    if environment.nvrtc_path.is_none() {
        environment.nvrtc_path = nvrtc_folder(python_path);
    }
    let kernels = Kernels::open(&environment)?;
    all.insert(ordinal, Arc::clone(&kernels));
    Ok(kernels)
}

/// The folder of the compiler that pip installed beside PyTorch. Without one the loader's path is searched.
fn nvrtc_folder(python_path: &[PathBuf]) -> Option<PathBuf> {
    let folders = python_path.iter().flat_map(|entry| PIP_FOLDERS.map(|folder| entry.join(folder)));
    folders.into_iter().find(|folder| holds_nvrtc(folder))
}

fn holds_nvrtc(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("libnvrtc.so"))
}
