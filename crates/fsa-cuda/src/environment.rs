//! The environment variables that the backend reads, in one place and once.

use crate::arch::{Arch, KernelSet};
use crate::plan::Routing;
use crate::source::QuerySums;
use fsa_core::Result;
use std::path::PathBuf;

/// Name and meaning of every environment variable that the backend reads.
pub const VARIABLES: [(&str, &str); 8] = [
    ("FSA_CACHE_DIR", "folder of compiled kernels; unset: XDG_CACHE_HOME/fsa, else ~/.cache/fsa"),
    ("XDG_CACHE_HOME", "folder of the user's caches, where FSA_CACHE_DIR is not set"),
    ("FSA_DISABLE_CACHE", "1: compiled kernels are neither read from nor written to disk"),
    ("FSA_NVRTC_PATH", "the library libnvrtc, or a folder that holds it; unset: the usual places are searched"),
    ("FSA_CUDA_ARCH", "newest architecture whose kernels are used: sm_80 takes the portable ones on any device"),
    ("FSA_ROUTE", "how stage `selected` goes: kv_outer, dense_masked, both in turn, or the fastest; unset: fastest"),
    ("FSA_QUERY_SUMS", "f32: gradients of queries in bf16 are added up in f32 on Hopper, too; unset: scaled, in f16"),
    ("FSA_CUDA_DEVICE", "number of the device of `--device cuda`; unset: 0"),
];

/// What the environment asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Environment {
    /// Folder of compiled kernels; `None` if the cache is disabled or there is no place for it.
    pub cache_dir: Option<PathBuf>,
    /// The compiler's library or its folder, where it is given.
    pub nvrtc_path: Option<PathBuf>,
    /// Folders of Python environments, in which pip may have put the compiler.
    pub python_prefixes: Vec<PathBuf>,
    /// Kernels to use instead of the device's own.
    pub kernels: Option<KernelSet>,
    /// How stage `selected` goes.
    pub routing: Routing,
    /// How gradients of queries are added up.
    pub query_sums: Option<QuerySums>,
    /// Whether lists of blocks are made in one pass with compressed attention; see [`crate::plan::PlanOptions::one_pass`]. No variable
    /// says so.
    pub one_pass: Option<bool>,
    /// Number of the device.
    pub device: usize,
}

impl Environment {
    /// Reads the variables of this process.
    ///
    /// # Errors
    /// A variable that does not hold what it must.
    pub fn read() -> Result<Self> {
        Self::from_lookup(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// Reads the variables through `lookup`, which gives the value of a name.
    ///
    /// # Errors
    /// A variable that does not hold what it must.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let get = |name: &str| lookup(name).filter(|text| !text.trim().is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let home = path("HOME").or_else(|| path("USERPROFILE"));
        let disabled = get("FSA_DISABLE_CACHE").is_some_and(|text| text.trim() != "0");
        let cache_dir = path("FSA_CACHE_DIR")
            .or_else(|| path("XDG_CACHE_HOME").map(|folder| folder.join("fsa")))
            .or_else(|| home.as_ref().map(|home| home.join(".cache").join("fsa")));
        let kernels = match get("FSA_CUDA_ARCH") {
            Some(text) => Some(text.trim().parse::<Arch>().map_err(|error| name("FSA_CUDA_ARCH", error))?.kernels()),
            None => None,
        };
        let routing = match get("FSA_ROUTE") {
            Some(text) => text.trim().parse().map_err(|error| name("FSA_ROUTE", error))?,
            None => Routing::default(),
        };
        let query_sums = match get("FSA_QUERY_SUMS") {
            Some(text) => Some(text.trim().parse().map_err(|error| name("FSA_QUERY_SUMS", error))?),
            None => None,
        };
        let device = match get("FSA_CUDA_DEVICE") {
            Some(text) => text.trim().parse().map_err(|_| {
                fsa_core::Error::input("FSA_CUDA_DEVICE", "the number of a device", format!("{text:?}"))
            })?,
            None => 0,
        };
        let python_prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(path);
        let python_prefixes = python_prefixes.chain(home.map(|home| home.join(".local"))).collect();
        let cache_dir = cache_dir.filter(|_| !disabled);
        Ok(Self {
            cache_dir,
            nvrtc_path: path("FSA_NVRTC_PATH"),
            python_prefixes,
            kernels,
            routing,
            query_sums,
            one_pass: None,
            device,
        })
    }
}

/// The error under the variable's name.
fn name(variable: &str, error: fsa_core::Error) -> fsa_core::Error {
    match error {
        fsa_core::Error::Input(error) => fsa_core::Error::input(variable, error.expected, error.got),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(values: &[(&str, &str)]) -> Result<Environment> {
        Environment::from_lookup(|name| values.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn the_cache_lies_in_the_first_place_that_is_given() {
        let all = [("FSA_CACHE_DIR", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")];
        let dir = |values: &[_]| read(values).expect("valid").cache_dir;
        assert_eq!(dir(&all), Some("/a".into()));
        assert_eq!(dir(&all[1..]), Some("/b/fsa".into()));
        assert_eq!(dir(&all[2..]), Some("/c/.cache/fsa".into()));
        assert_eq!(dir(&[]), None);
        assert_eq!(dir(&[("FSA_DISABLE_CACHE", "1"), all[0]]), None);
        assert_eq!(dir(&[("FSA_DISABLE_CACHE", "0"), all[0]]), Some("/a".into()));
    }

    #[test]
    fn an_architecture_names_its_kernels_and_its_variable() {
        assert_eq!(read(&[("FSA_CUDA_ARCH", "sm_80")]).expect("valid").kernels, Some(KernelSet::Sm80));
        assert_eq!(read(&[("FSA_CUDA_ARCH", "sm_90a")]).expect("valid").kernels, Some(KernelSet::Sm90));
        for (variable, text) in [
            ("FSA_CUDA_ARCH", "hopper"),
            ("FSA_CUDA_DEVICE", "first"),
            ("FSA_ROUTE", "quick"),
            ("FSA_QUERY_SUMS", "f8"),
        ] {
            assert_eq!(read(&[(variable, text)]).expect_err(text).argument(), Some(variable));
        }
    }

    #[test]
    fn every_variable_is_listed() {
        let listed: Vec<_> = VARIABLES.iter().map(|(name, _)| *name).collect();
        let asked = std::cell::RefCell::new(Vec::new());
        let _ = Environment::from_lookup(|name| {
            asked.borrow_mut().push(name.to_string());
            None
        });
        // Where things lie on any system, set by others than the user of this program.
        let system = ["HOME", "USERPROFILE", "VIRTUAL_ENV", "CONDA_PREFIX"];
        for name in asked.into_inner() {
            assert!(listed.contains(&name.as_str()) || system.contains(&name.as_str()), "{name} is not listed");
        }
    }
}
