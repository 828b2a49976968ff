//! Kernels per device and plans per call, made once and kept.

use crate::memory::device::Place;
use fsa::Result;
use fsa::cuda::plan::PlanOptions;
use fsa::cuda::selected::{SelectedBackward, SelectedForward};
use fsa::cuda::{Environment, Kernels};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// What a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub place: Place,
    pub backward: bool,
    /// Of the backward: a forward has one plan.
    pub deterministic: bool,
}

/// A plan with its kernels.
#[derive(Debug)]
pub enum Launch {
    Forward(SelectedForward),
    Backward(SelectedBackward),
}

/// A plan and where it is for.
#[derive(Debug)]
pub struct Planned {
    pub place: Place,
    pub kernels: Arc<Kernels>,
    pub launch: Launch,
}

impl Planned {
    /// Size of the workspace of a launch.
    pub fn workspace_bytes(&self) -> usize {
        match &self.launch {
            Launch::Forward(forward) => forward.workspace_bytes(),
            Launch::Backward(backward) => backward.workspace_bytes(),
        }
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
    let Key { place, backward, deterministic } = *key;
    let kernels = kernels(place.ordinal, python_path)?;
    let options = PlanOptions { deterministic, ..PlanOptions::default() };
    let launch = if backward {
        Launch::Backward(SelectedBackward::plan(&kernels, &place.problem, &options)?)
    } else {
        Launch::Forward(SelectedForward::plan(&kernels, &place.problem, &options)?)
    };
    let planned = Arc::new(Planned { place, kernels, launch });
    let mut plans = lock(&PLANS);
    if plans.len() >= MAX_PLANS {
        plans.clear();
    }
    Ok(plans.entry(*key).or_insert(planned).clone())
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
