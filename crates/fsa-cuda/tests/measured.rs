//! Measured routes on disk: whatever happens to them, a plan is made.

use fsa_core::DType;
use fsa_cuda::KernelSet;
use fsa_cuda::measured::{MeasuredRoutes, RouteTimes};
use fsa_cuda::plan::{Pass, Problem, Route};
use std::path::Path;

const TIMES: RouteTimes = RouteTimes { kv_outer: 0.31, dense_masked: 0.255 };

fn problem(tokens: usize) -> Problem {
    Problem {
        total_q: tokens,
        total_kv: tokens,
        sequences: 1,
        num_q_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        block_size: 64,
        topk: 16,
        dtype: DType::Bf16,
    }
}

fn routes(folder: &Path, device: &str) -> MeasuredRoutes {
    MeasuredRoutes::new(Some(folder.to_path_buf()), device, KernelSet::Sm90)
}

#[test]
fn a_measurement_is_that_of_its_device_pass_kernels_and_shapes() {
    let folder = tempfile::tempdir().expect("folder");
    let here = routes(folder.path(), "H200");
    assert_eq!(here.get(&problem(4096), Pass::Forward), None);
    assert!(here.put(&problem(4096), Pass::Forward, &TIMES));
    let found = routes(folder.path(), "H200").get(&problem(4096), Pass::Forward).expect("kept");
    assert_eq!(here.get(&problem(4096), Pass::Forward), Some(found));
    assert_eq!((found, found.faster()), (TIMES, Route::DenseMasked));
    assert_eq!(here.get(&problem(4200), Pass::Forward), Some(TIMES), "nearly the same length");
    let others = [
        here.get(&problem(4096), Pass::Backward),
        here.get(&problem(8192), Pass::Forward),
        here.get(&Problem { topk: 8, ..problem(4096) }, Pass::Forward),
        here.get(&Problem { dtype: DType::F16, ..problem(4096) }, Pass::Forward),
        routes(folder.path(), "H100").get(&problem(4096), Pass::Forward),
        MeasuredRoutes::new(Some(folder.path().into()), "H200", KernelSet::Sm80).get(&problem(4096), Pass::Forward),
    ];
    assert_eq!(others, [None; 6]);
    let newer = RouteTimes { kv_outer: 0.2, ..TIMES };
    assert!(here.put(&problem(4096), Pass::Forward, &newer));
    assert_eq!(here.get(&problem(4096), Pass::Forward).map(|times| times.faster()), Some(Route::KvOuter));
}

#[test]
fn what_is_damaged_counts_as_absent_and_is_replaced() {
    let folder = tempfile::tempdir().expect("folder");
    let here = routes(folder.path(), "H200");
    assert!(here.put(&problem(1000), Pass::Backward, &TIMES));
    let entry = std::fs::read_dir(folder.path().join("routes")).expect("a folder").next().expect("an entry");
    let path = entry.expect("readable").path();
    let whole = std::fs::read(&path).expect("readable");
    let text = String::from_utf8(whole.clone()).expect("text");
    let mut damaged: Vec<Vec<u8>> = (0..whole.len() - 1).map(|length| whole[..length].to_vec()).collect();
    damaged.extend(["nan", "-1e0", "0e0", "inf", "", "1e0 2"].map(|bad| text.replacen("3.1e-1", bad, 1).into_bytes()));
    damaged.push(text.replace("01\n", "99\n").into_bytes());
    damaged.push(vec![0xff; 40]);
    for bytes in damaged {
        std::fs::write(&path, &bytes).expect("writable");
        // What a process has read it does not read again.
        let found = routes(folder.path(), "H200").get(&problem(1000), Pass::Backward);
        assert_eq!(found, None, "{:?}", String::from_utf8_lossy(&bytes));
    }
    assert!(here.put(&problem(1000), Pass::Backward, &TIMES));
    assert_eq!(routes(folder.path(), "H200").get(&problem(1000), Pass::Backward), Some(TIMES));
    let left = std::fs::read_dir(folder.path().join("routes")).expect("a folder").count();
    assert_eq!(left, 1, "no temporary file stays");
}

#[test]
fn without_a_place_nothing_is_kept_and_nothing_fails() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "not a folder").expect("writable");
    for place in [None, Some(file)] {
        let nowhere = MeasuredRoutes::new(place, "H200", KernelSet::Sm90);
        assert!(!nowhere.put(&problem(100), Pass::Forward, &TIMES));
    }
    assert_eq!(MeasuredRoutes::new(None, "H200", KernelSet::Sm90).get(&problem(100), Pass::Forward), None);
}
