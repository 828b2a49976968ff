//! Compiled kernels on disk, by the hash of everything that they depend on.
//!
//! An entry is written beside its place and renamed into it, so a reader sees all of it or nothing, and processes
//! that compile the same kernel at the same time do no harm. It carries a checksum: what is damaged counts as absent
//! and is written anew. A folder that is missing and cannot be made, or cannot be written, only costs the time of
//! compiling again.

use crate::jit::Cubin;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// First bytes of an entry; the number is the version of the format.
const MAGIC: &[u8; 8] = b"FSAcub01";

/// Magic, checksum, length of the log.
const HEADER_BYTES: usize = MAGIC.len() + blake3::OUT_LEN + size_of::<u64>();

/// File that names the version of the compiler that wrote last.
const COMPILER: &str = "compiler";

/// The folder, or nothing if the cache is disabled.
#[derive(Debug, Clone)]
pub struct KernelCache {
    folder: Option<PathBuf>,
}

/// Name of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheKey(String);

impl KernelCache {
    /// A cache in `folder`, which need not exist; `None` disables it.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder: folder.map(|folder| folder.join("kernels")) }
    }

    /// Where the entries lie.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The key of a compilation: source, headers, options (the architecture among them), compiler and this crate.
    pub fn key(source: &str, headers: &[(&str, &str)], options: &[String], compiler: (u32, u32)) -> CacheKey {
        let mut hasher = blake3::Hasher::new();
        let mut part = |text: &str| {
            // With its length, so that text cannot move from one part to the next unseen.
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        part(env!("CARGO_PKG_VERSION"));
        part(&format!("{}.{}", compiler.0, compiler.1));
        part(source);
        headers.iter().for_each(|(name, text)| {
            part(name);
            part(text);
        });
        options.iter().for_each(|option| part(option));
        CacheKey(hasher.finalize().to_hex().to_string())
    }

    fn path(&self, key: &CacheKey) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(&key.0).with_extension("cubin"))
    }

    /// The entry, if there is one and it is whole. A damaged one is removed.
    pub fn get(&self, key: &CacheKey) -> Option<Cubin> {
        let path = self.path(key)?;
        let bytes = std::fs::read(&path).ok()?;
        let cubin = decode(&bytes);
        if cubin.is_none() {
            let _ = std::fs::remove_file(&path);
        }
        cubin
    }

    /// Writes an entry; false if it could not be written, which is no error.
    pub fn put(&self, key: &CacheKey, cubin: &Cubin, compiler: (u32, u32)) -> bool {
        let (Some(folder), Some(path)) = (&self.folder, self.path(key)) else { return false };
        let version = format!("{}.{}", compiler.0, compiler.1);
        let written = std::fs::create_dir_all(folder).and_then(|()| replace(&path, &encode(cubin)));
        written.and_then(|()| replace(&folder.join(COMPILER), version.as_bytes())).is_ok()
    }

    /// Version of the compiler that wrote the last entry.
    pub fn last_compiler(&self) -> Option<(u32, u32)> {
        let text = std::fs::read_to_string(self.folder.as_ref()?.join(COMPILER)).ok()?;
        let (major, minor) = text.trim().split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    /// Paths and sizes of all entries.
    ///
    /// # Errors
    /// The folder exists and cannot be read.
    pub fn entries(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        let Some(folder) = &self.folder else { return Ok(Vec::new()) };
        let listed = match std::fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            listed => listed?,
        };
        let mut entries = Vec::new();
        for entry in listed {
            let entry = entry?;
            if entry.path().extension().is_some_and(|extension| extension == "cubin") {
                entries.push((entry.path(), entry.metadata()?.len()));
            }
        }
        entries.sort();
        Ok(entries)
    }

    /// Removes every entry and says how many there were.
    ///
    /// # Errors
    /// One of them cannot be removed.
    pub fn clear(&self) -> io::Result<usize> {
        let entries = self.entries()?;
        entries.iter().try_for_each(|(path, _)| std::fs::remove_file(path))?;
        Ok(entries.len())
    }
}

/// Writes beside `path` and renames: other processes see the old file or all of the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
    let written = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

fn encode(cubin: &Cubin) -> Vec<u8> {
    let mut payload = (cubin.log.len() as u64).to_le_bytes().to_vec();
    payload.extend_from_slice(cubin.log.as_bytes());
    payload.extend_from_slice(&cubin.image);
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(blake3::hash(&payload).as_bytes());
    bytes.extend_from_slice(&payload);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Cubin> {
    let payload = bytes.get(HEADER_BYTES - size_of::<u64>()..)?;
    let checksum = &bytes[MAGIC.len()..MAGIC.len() + blake3::OUT_LEN];
    if !bytes.starts_with(MAGIC) || blake3::hash(payload).as_bytes() != checksum {
        return None;
    }
    let (length, rest) = payload.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (log, image) = rest.split_at_checked(length)?;
    Some(Cubin { image: image.to_vec(), log: String::from_utf8(log.to_vec()).ok()? })
}
