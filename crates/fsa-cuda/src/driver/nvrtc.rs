//! NVRTC, the run-time compiler: found and loaded at run time, given its headers in memory.

use crate::environment::Environment;
use crate::error::{CudaError, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

type Program = *mut c_void;
type Status = c_int;
type GetSize = unsafe extern "C" fn(Program, *mut usize) -> Status;
type GetBytes = unsafe extern "C" fn(Program, *mut c_char) -> Status;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> Status;

/// The functions of the library that are used.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    num_archs: unsafe extern "C" fn(*mut c_int) -> Status,
    archs: unsafe extern "C" fn(*mut c_int) -> Status,
    create: Create,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    log_size: GetSize,
    log: GetBytes,
    cubin_size: GetSize,
    cubin: GetBytes,
    ptx_size: GetSize,
    ptx: GetBytes,
}

/// What a compilation gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// The ELF image for the driver.
    pub cubin: Vec<u8>,
    /// The intermediate assembly.
    pub ptx: Vec<u8>,
    /// Warnings, and the resources of every kernel.
    pub log: String,
}

/// The loaded compiler.
pub struct Nvrtc {
    functions: Functions,
    version: (u32, u32),
    path: PathBuf,
    /// Never unloaded while the functions can be called: compiler first, its built-ins after it.
    _libraries: Vec<Library>,
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NVRTC {}.{} at {}", self.version.0, self.version.1, self.path.display())
    }
}

/// File names of the library, newest first.
const NAMES: [&str; 4] = if cfg!(windows) {
    ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "nvrtc.dll", "nvrtc64.dll"]
} else {
    ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "libnvrtc.dylib"]
};

/// Where pip puts the library below `site-packages`: CUDA 13 and later, and before.
const PIP_FOLDERS: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];

/// Every path to try, best first.
fn candidates(environment: &Environment) -> Vec<PathBuf> {
    if let Some(path) = &environment.nvrtc_path {
        return if path.is_dir() { NAMES.iter().map(|name| path.join(name)).collect() } else { vec![path.clone()] };
    }
    let mut paths: Vec<PathBuf> = NAMES.iter().map(PathBuf::from).collect();
    let system = ["/usr/local/lib", "/usr/lib"].map(|lib| Path::new(lib).to_path_buf());
    let libs = environment.python_prefixes.iter().map(|prefix| prefix.join("lib")).chain(system);
    for lib in libs {
        for python in subfolders(&lib, "python3") {
            for packages in ["site-packages", "dist-packages"] {
                let folders = PIP_FOLDERS.iter().map(|folder| python.join(packages).join(folder));
                let folders = folders.filter(|folder| folder.is_dir());
                paths.extend(folders.flat_map(|folder| NAMES.iter().map(move |name| folder.join(name))));
            }
        }
    }
    for toolkit in subfolders(Path::new("/usr/local"), "cuda") {
        paths.extend(NAMES.iter().map(|name| toolkit.join("lib64").join(name)));
    }
    paths
}

/// Folders in `folder` whose name starts with `prefix`, the last of the alphabet first.
fn subfolders(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found
}

/// Loads a library so that others find its symbols and its name.
fn open_library(path: &Path) -> Option<Library> {
    #[cfg(unix)]
    {
        use libloading::os::unix;
        // SAFETY: the initialisers of NVRTC and its built-ins only set up the library itself.
        unsafe { unix::Library::open(Some(path), unix::RTLD_NOW | unix::RTLD_GLOBAL) }.ok().map(Library::from)
    }
    #[cfg(not(unix))]
    {
        // SAFETY: as above.
        unsafe { Library::new(path) }.ok()
    }
}

/// NVRTC opens its built-ins by bare name, which fails outside of the loader's path unless they are loaded already.
fn open_builtins(library: &Path) -> Vec<Library> {
    let Some(folder) = library.parent().filter(|folder| folder.is_absolute()) else { return Vec::new() };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_builtins = |name: &str| name.starts_with("libnvrtc-builtins.so") && !name.contains(".alt.");
    entries
        .filter(|entry| is_builtins(&entry.file_name().to_string_lossy()))
        .filter_map(|entry| open_library(&entry.path()))
        .collect()
}

impl Functions {
    fn load(library: &Library) -> Option<Self> {
        /// # Safety
        /// `T` is the type of the function of that name.
        unsafe fn get<T: Copy>(library: &Library, name: &str) -> Option<T> {
            // SAFETY: passed on to the caller.
            unsafe { library.get::<T>(name.as_bytes()) }.ok().map(|symbol| *symbol)
        }
        // SAFETY: the types are those of nvrtc.h, which have not changed since CUDA 11.1.
        unsafe {
            Some(Self {
                version: get(library, "nvrtcVersion")?,
                error_string: get(library, "nvrtcGetErrorString")?,
                num_archs: get(library, "nvrtcGetNumSupportedArchs")?,
                archs: get(library, "nvrtcGetSupportedArchs")?,
                create: get(library, "nvrtcCreateProgram")?,
                destroy: get(library, "nvrtcDestroyProgram")?,
                compile: get(library, "nvrtcCompileProgram")?,
                log_size: get(library, "nvrtcGetProgramLogSize")?,
                log: get(library, "nvrtcGetProgramLog")?,
                cubin_size: get(library, "nvrtcGetCUBINSize")?,
                cubin: get(library, "nvrtcGetCUBIN")?,
                ptx_size: get(library, "nvrtcGetPTXSize")?,
                ptx: get(library, "nvrtcGetPTX")?,
            })
        }
    }
}

/// A program, destroyed on drop.
struct ProgramGuard<'a> {
    functions: &'a Functions,
    raw: Program,
}

impl ProgramGuard<'_> {
    fn bytes(&self, size: GetSize, bytes: GetBytes) -> Result<Vec<u8>, Status> {
        let mut length = 0;
        // SAFETY: the program lives while `self` does, and `length` outlives the call.
        status(unsafe { size(self.raw, &mut length) })?;
        let mut buffer = vec![0u8; length];
        // SAFETY: the buffer has the size that the library asked for.
        status(unsafe { bytes(self.raw, buffer.as_mut_ptr().cast()) })?;
        Ok(buffer)
    }

    fn log(&self) -> String {
        let bytes = self.bytes(self.functions.log_size, self.functions.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').trim().to_string()
    }
}

impl Drop for ProgramGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created and not destroyed since.
        let _ = unsafe { (self.functions.destroy)(&mut self.raw) };
    }
}

fn status(status: Status) -> Result<(), Status> {
    if status == 0 { Ok(()) } else { Err(status) }
}

/// Texts as terminated strings, and the pointers to them. A text with a NUL byte becomes empty.
fn strings<'a>(texts: impl Iterator<Item = &'a str>) -> (Vec<CString>, Vec<*const c_char>) {
    let owned: Vec<CString> = texts.map(|text| CString::new(text).unwrap_or_default()).collect();
    let pointers = owned.iter().map(|text| text.as_ptr()).collect();
    (owned, pointers)
}

impl Nvrtc {
    /// Finds and loads the compiler.
    ///
    /// # Errors
    /// [`CudaError::NvrtcMissing`] with every place that was tried.
    pub fn open(environment: &Environment) -> Result<Self> {
        let paths = candidates(environment);
        for path in &paths {
            let mut libraries = open_builtins(path);
            let Some(library) = open_library(path) else { continue };
            let Some(functions) = Functions::load(&library) else { continue };
            let (mut major, mut minor) = (0, 0);
            // SAFETY: both numbers outlive the call.
            let _ = unsafe { (functions.version)(&mut major, &mut minor) };
            libraries.insert(0, library);
            let version = (major.unsigned_abs(), minor.unsigned_abs());
            return Ok(Self { functions, version, path: path.clone(), _libraries: libraries });
        }
        Err(CudaError::NvrtcMissing { searched: paths.iter().map(|path| path.display().to_string()).collect() })
    }

    /// Its version.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Compute capabilities that it can compile for, as `major * 10 + minor`.
    pub fn supported_archs(&self) -> Vec<u32> {
        let mut count = 0;
        // SAFETY: the number outlives the call.
        let _ = unsafe { (self.functions.num_archs)(&mut count) };
        let mut archs = vec![0; usize::try_from(count).unwrap_or(0)];
        if !archs.is_empty() {
            // SAFETY: the array has the size that the library asked for.
            let _ = unsafe { (self.functions.archs)(archs.as_mut_ptr()) };
        }
        archs.into_iter().map(c_int::unsigned_abs).collect()
    }

    /// Compiles `source` to a cubin.
    ///
    /// # Errors
    /// Name of the failure and the compiler's log.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        options: &[String],
    ) -> Result<Compiled, (String, String)> {
        let functions = &self.functions;
        let describe = |status: Status, log: String| {
            // SAFETY: any number gives a static string.
            let text = unsafe { CStr::from_ptr((functions.error_string)(status)) };
            (text.to_string_lossy().into_owned(), log)
        };
        let (owned, pointers) = strings([source, name].into_iter());
        let (names, name_pointers) = strings(headers.iter().map(|(name, _)| *name));
        let (texts, text_pointers) = strings(headers.iter().map(|(_, text)| *text));
        let (flags, flag_pointers) = strings(options.iter().map(String::as_str));
        let mut raw = std::ptr::null_mut();
        let count = headers.len() as c_int;
        // SAFETY: every pointer is to a terminated string that is dropped after the last use below.
        let created = unsafe {
            (functions.create)(
                &mut raw,
                pointers[0],
                pointers[1],
                count,
                text_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        };
        status(created).map_err(|status| describe(status, String::new()))?;
        let program = ProgramGuard { functions, raw };
        // SAFETY: the program was created, and the options are terminated strings.
        let compiled =
            unsafe { (functions.compile)(program.raw, flag_pointers.len() as c_int, flag_pointers.as_ptr()) };
        status(compiled).map_err(|status| describe(status, program.log()))?;
        drop((owned, names, texts, flags));
        let fetch = |size, bytes| program.bytes(size, bytes).map_err(|status| describe(status, program.log()));
        Ok(Compiled {
            cubin: fetch(functions.cubin_size, functions.cubin)?,
            ptx: fetch(functions.ptx_size, functions.ptx)?,
            log: program.log(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_path_is_the_only_place_that_is_searched() {
        let environment = Environment { nvrtc_path: Some("/nowhere/libnvrtc.so.13".into()), ..Environment::default() };
        let error = Nvrtc::open(&environment).expect_err("there is none");
        assert_eq!(error, CudaError::NvrtcMissing { searched: vec!["/nowhere/libnvrtc.so.13".into()] });
        let text = error.to_string();
        assert!(text.contains("pip install nvidia-cuda-nvrtc") && text.contains("FSA_NVRTC_PATH"), "{text}");
    }

    #[test]
    fn a_python_environment_is_searched_after_the_loaders_path() {
        let root = tempfile::tempdir().expect("folder");
        let lib = root.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).expect("folder");
        let prefix = root.path().to_path_buf();
        let environment = Environment { python_prefixes: vec![prefix], ..Environment::default() };
        let paths = candidates(&environment);
        assert_eq!(paths[0], PathBuf::from(NAMES[0]));
        assert!(paths.contains(&lib.join(NAMES[0])), "{paths:?}");
    }
}
