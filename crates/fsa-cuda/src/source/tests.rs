use super::files::{FILES, includes};
use super::*;
use crate::plan::MAX_TOPK;

#[test]
fn the_index_is_compiled_once_per_block_size() {
    let all = specialisations(KernelSet::Sm90);
    let count = |kernel| all.iter().filter(|specialisation| specialisation.kernel == kernel).count();
    assert_eq!(count(Kernel::Index), 5);
    for kernel in [Kernel::Attend, Kernel::Reduce, Kernel::Backward] {
        // Large blocks of large heads do not fit.
        assert!((2 * 20..=2 * 80).contains(&count(kernel)), "{kernel}: {}", count(kernel));
    }
    assert!(all.iter().all(|specialisation| specialisation.smem_bytes(1) <= MAX_CTA_SMEM_BYTES));
}

#[test]
fn portable_kernels_fit_the_smallest_devices() {
    let all = specialisations(KernelSet::Sm80);
    // 5 of the index, and one that prepares; 2 dtypes, 5 dimensions and 5 block sizes of those of stage `selected`, partials of
    // the last, of stage `select`, of masks and of attention with a mask and its backward; 2 dtypes and 5 dimensions of the six
    // others.
    assert_eq!(all.len(), 5 + 1 + 8 * 50 + 6 * 10);
    for specialisation in all {
        // 99 KB on devices of compute capability 8.6 and 8.9, of which plans leave 3 KB alone: one more is to spare.
        assert!(specialisation.smem_bytes(MAX_TOPK) <= 95 << 10, "{specialisation}");
    }
}

#[test]
fn every_kernel_of_a_set_is_its_own_or_portable() {
    // What one kernel does in a pass, two do everywhere.
    for kernel in Kernel::ALL.into_iter().filter(|kernel| !matches!(kernel, Kernel::BandPair | Kernel::BandSelect)) {
        for head_dim in HEAD_DIMS {
            let own = Specialisation::new(kernel, KernelSet::Sm90, DType::F16, head_dim, 64).or_portable(1);
            assert!(own.exists(1), "{own}");
        }
    }
    let large = |head_dim| {
        Specialisation::new(Kernel::BandBackward, KernelSet::Sm90, DType::Bf16, head_dim, 64).or_portable(1).set
    };
    assert_eq!((large(128), large(192)), (KernelSet::Sm90, KernelSet::Sm80));
}

#[test]
fn every_include_is_embedded() {
    for (path, text) in FILES {
        for name in includes(text) {
            assert!(FILES.iter().any(|(path, _)| *path == name), "{path} includes {name}");
        }
    }
}

/// Warps of a CTA that go through its tiles in different orders wait for each other for ever, where it has more than one.
#[test]
fn a_kernel_takes_its_tiles_in_one_order() {
    let code = |text: &str| text.lines().map(|line| line.split("//").next().unwrap_or(line)).collect::<String>();
    let mut in_rounds = 0;
    for (path, text) in FILES.iter().filter(|(path, _)| !path.starts_with("block/")) {
        let code = code(text);
        let (rounds, stride) = (code.contains("next_tile("), code.contains("gridDim.x"));
        assert!(!(rounds && stride), "{path}: next_tile in one loop, a stride of the grid in another");
        assert!(rounds || !code.contains("checked.check("), "{path}: what checks steps goes by next_tile");
        in_rounds += usize::from(rounds);
    }
    assert_eq!(
        in_rounds, 4,
        "attention to intervals, that chooses, to blocks and window, and the backward in two passes"
    );
}

#[test]
fn headers_are_those_that_a_unit_includes() {
    let names = |kernel| {
        let unit =
            Specialisation::new(kernel, KernelSet::Sm90, DType::Bf16, 128, 64).translation_unit().expect("is there");
        headers(&unit).into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    let (attend, band) = (names(Kernel::Attend), names(Kernel::Band));
    assert!(attend.contains(&"attend_sm90.cuh") && attend.contains(&"base/types.cuh"), "itself, and through others");
    assert!(band.contains(&"block/band_rows.cuh") && !attend.contains(&"block/band_rows.cuh"));
    assert!(attend.is_sorted() && attend.len() < files().len());
}

#[test]
fn a_translation_unit_states_what_the_sides_agree_on() {
    let attend = Specialisation::new(Kernel::Attend, KernelSet::Sm90, DType::F16, 64, 32);
    let text = attend.translation_unit().expect("a Hopper kernel");
    assert!(text.starts_with("#define FSA_HEAD_DIM 64\n#define FSA_BLOCK_SIZE 32\n#define FSA_IS_BF16 0\n"));
    assert!(text.contains("#include \"attend_sm90.cuh\"\n"));
    assert!(text.contains("static_assert(Same<decltype(attend), void(AttendParams)>::value"));
}
