//! The cache on disk: whatever happens to it, kernels come out right.

use fsa_cuda::cache::{CacheKey, KernelCache};
use fsa_cuda::jit::Cubin;
use std::path::Path;

fn key(source: &str) -> CacheKey {
    KernelCache::key(source, &[("a.cuh", "text")], &["--gpu-architecture=sm_90a".into()], (13, 0))
}

fn cubin(byte: u8) -> Cubin {
    Cubin { image: vec![byte; 10_000], log: "ptxas info: Used 1 registers".into() }
}

fn cache_in(folder: &Path) -> KernelCache {
    KernelCache::new(Some(folder.to_path_buf()))
}

#[test]
fn an_entry_comes_back_as_it_was_and_so_does_the_compiler() {
    let folder = tempfile::tempdir().expect("folder");
    let cache = cache_in(folder.path());
    assert_eq!((cache.get(&key("k")), cache.last_compiler()), (None, None));
    assert!(cache.put(&key("k"), &cubin(7), (13, 0)));
    assert_eq!(cache.get(&key("k")), Some(cubin(7)));
    assert_eq!((cache.get(&key("other")), cache.last_compiler()), (None, Some((13, 0))));
    assert_eq!(cache.entries().expect("readable").len(), 1);
    assert_eq!(cache.clear().expect("writable"), 1);
    assert_eq!(cache.get(&key("k")), None);
}

#[test]
fn every_part_of_a_compilation_changes_the_key() {
    let options = |arch: &str| vec![format!("--gpu-architecture={arch}")];
    let base = KernelCache::key("s", &[("h", "t")], &options("sm_90a"), (13, 0));
    let others = [
        KernelCache::key("r", &[("h", "t")], &options("sm_90a"), (13, 0)),
        KernelCache::key("s", &[("h", "u")], &options("sm_90a"), (13, 0)),
        KernelCache::key("s", &[("ht", "")], &options("sm_90a"), (13, 0)),
        KernelCache::key("s", &[("h", "t")], &options("sm_80"), (13, 0)),
        KernelCache::key("s", &[("h", "t")], &options("sm_90a"), (13, 1)),
    ];
    assert!(others.iter().all(|other| *other != base));
}

#[test]
fn a_damaged_entry_counts_as_absent_and_is_replaced() {
    let folder = tempfile::tempdir().expect("folder");
    let cache = cache_in(folder.path());
    assert!(cache.put(&key("k"), &cubin(7), (13, 0)));
    let path = cache.entries().expect("readable")[0].0.clone();
    let whole = std::fs::read(&path).expect("readable");
    let mut damaged: Vec<Vec<u8>> = [0, 7, 8, 39, 40, 47, 48, 60, whole.len() / 2, whole.len() - 1]
        .map(|place| {
            let mut bytes = whole.clone();
            bytes[place] ^= 0x10;
            bytes
        })
        .to_vec();
    damaged.extend([0, 1, 40, 47, 48, whole.len() - 1].map(|length| whole[..length].to_vec()));
    damaged.push([whole.clone(), vec![0]].concat());
    for bytes in damaged {
        std::fs::write(&path, &bytes).expect("writable");
        assert_eq!(cache.get(&key("k")), None, "{} bytes", bytes.len());
        assert!(!path.exists(), "the damaged file is gone");
        assert!(cache.put(&key("k"), &cubin(7), (13, 0)));
        assert_eq!(cache.get(&key("k")), Some(cubin(7)));
    }
}

#[test]
fn a_place_that_cannot_be_written_costs_only_time() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "not a folder").expect("writable");
    let cache = cache_in(&file);
    assert!(!cache.put(&key("k"), &cubin(7), (13, 0)));
    assert_eq!(cache.get(&key("k")), None);
    assert!(cache.entries().is_err() || cache.entries().expect("checked").is_empty());
}

#[cfg(unix)]
#[test]
fn a_folder_that_is_read_only_still_serves_what_it_has() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("folder");
    let cache = cache_in(folder.path());
    assert!(cache.put(&key("k"), &cubin(7), (13, 0)));
    let kernels = cache.folder().expect("enabled").to_path_buf();
    std::fs::set_permissions(&kernels, std::fs::Permissions::from_mode(0o555)).expect("owner");
    assert_eq!(cache.get(&key("k")), Some(cubin(7)));
    // A superuser may write all the same; either way nothing breaks.
    let written = cache.put(&key("other"), &cubin(8), (13, 0));
    assert_eq!(cache.get(&key("other")).is_some(), written);
    std::fs::set_permissions(&kernels, std::fs::Permissions::from_mode(0o755)).expect("owner");
}

#[test]
fn a_disabled_cache_holds_nothing() {
    let cache = KernelCache::new(None);
    assert!(!cache.put(&key("k"), &cubin(7), (13, 0)));
    assert_eq!((cache.get(&key("k")), cache.folder()), (None, None));
    assert_eq!(cache.entries().expect("none").len(), 0);
}

#[test]
fn writers_and_readers_at_the_same_time_see_whole_entries() {
    let folder = tempfile::tempdir().expect("folder");
    std::thread::scope(|scope| {
        for writer in 0..4u8 {
            let cache = cache_in(folder.path());
            scope.spawn(move || (0..50).for_each(|_| assert!(cache.put(&key("k"), &cubin(writer), (13, 0)))));
        }
        for _ in 0..4 {
            let cache = cache_in(folder.path());
            scope.spawn(move || {
                for _ in 0..200 {
                    if let Some(found) = cache.get(&key("k")) {
                        assert!((0..4).any(|writer| found == cubin(writer)));
                    }
                }
            });
        }
    });
    let left: Vec<_> = std::fs::read_dir(folder.path().join("kernels")).expect("folder").flatten().collect();
    let temporary = left.iter().filter(|entry| entry.path().extension().is_some_and(|e| e == "tmp"));
    assert_eq!(temporary.count(), 0);
}
