//! What a machine lacks is said in words, with what to do about it.

mod call;

use call::Call;
use fsa_core::{Backend, DType, Error, Rope, RopeArgs, Tensor};
use fsa_cuda::driver::Device;
use fsa_cuda::jit::Compiler;
use fsa_cuda::source::{Kernel, Specialisation};
use fsa_cuda::{Arch, CudaBackend, CudaError, Environment, KernelSet};

#[test]
fn a_device_that_is_not_there_is_an_error() {
    let error = Device::open(4096).expect_err("nobody has as many");
    match &error {
        CudaError::NoDriver => assert!(error.to_string().contains("libcuda.so.1"), "{error}"),
        CudaError::NoDevice { .. } => assert!(error.to_string().contains("CUDA_VISIBLE_DEVICES"), "{error}"),
        other => panic!("{other}"),
    }
    let environment = Environment { device: 4096, ..Environment::default() };
    let error = CudaBackend::with(&environment).expect_err("nor through the backend");
    assert!(matches!(&error, Error::Backend { backend, .. } if backend == "cuda"), "{error}");
}

#[test]
fn a_missing_compiler_names_where_it_was_looked_for_and_how_to_get_it() {
    let nowhere = Environment { nvrtc_path: Some("/nowhere/libnvrtc.so".into()), ..Environment::default() };
    let compiler = Compiler::new(&nowhere);
    let specialisation = Specialisation::new(Kernel::Index, KernelSet::Sm90, DType::Bf16, 128, 64);
    let error = compiler.cubin(&specialisation, Arch::SM90).expect_err("no compiler, no cache").to_string();
    for text in ["/nowhere/libnvrtc.so", "pip install nvidia-cuda-nvrtc", "FSA_NVRTC_PATH"] {
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn messages_name_both_values() {
    let old = CudaError::DeviceTooOld { name: "Tesla T4".into(), capability: (7, 5) };
    assert_eq!(old.to_string(), "Tesla T4 has compute capability 7.5, needed is 8.0 or later (Ampere)");
    let driver = CudaError::DriverTooOld { found: (11, 4), needed: (12, 0), release: 525 };
    assert!(driver.to_string().contains("11.4") && driver.to_string().contains("12.0"), "{driver}");
    let memory: Error = CudaError::OutOfMemory { what: "key".into(), bytes: 12 }.into();
    assert_eq!(memory.to_string(), "out of memory: key on the device needs 12 bytes");
    let compiler = CudaError::ArchUnknown { version: (12, 0), arch: "sm_120".parse().expect("valid") };
    assert!(compiler.to_string().contains("sm_120"), "{compiler}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_the_kernels_do_not_reach_is_refused_by_name() {
    let backend = CudaBackend::new().expect("a device");
    let rotate = |dim: usize, position: usize| {
        let input = Tensor::zeros("input", DType::Bf16, &[1, 1, dim]).expect("small");
        let mut out = Tensor::zeros("out", DType::Bf16, &[1, 1, dim]).expect("small");
        let (rope, positions) = (Rope::default(), [position]);
        let args = RopeArgs { input: input.view(), positions: &positions, rope: &rope, inverse: false };
        match backend.rope(&args, &mut out.view_mut()).expect_err("out of reach") {
            Error::Unsupported { constraint, .. } => constraint,
            other => other.to_string(),
        }
    };
    assert_eq!(rotate(264, 1), "head_dim on CUDA");
    assert_eq!(rotate(64, 1 << 31), "position on CUDA");
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_type_that_the_kernels_lack_is_refused_before_anything_is_written() {
    let backend = CudaBackend::new().expect("a device");
    let mut call = Call::new(DType::F32, 4, 0);
    let error = call.run(&backend, false).expect_err("f32");
    assert!(matches!(&error, Error::Unsupported { got, .. } if got == "f32"), "{error}");
    call.is_untouched();
}

#[test]
#[ignore = "needs a CUDA device"]
fn ids_are_validated_where_that_is_asked_for() {
    let backend = CudaBackend::new().expect("a device");
    let mut call = Call::new(DType::Bf16, 4, 7);
    let error = call.run(&backend, true).expect_err("block 7 of 4 rows");
    assert_eq!(error.argument(), Some("topk_indices"));
    call.is_untouched();
    call.run(&backend, false).expect("counts as absent");
    assert!(call.lse.view().to_f64().iter().all(|lse| *lse == f64::NEG_INFINITY));
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_compiler_that_is_missing_is_an_error_before_and_at_the_call() {
    let environment = Environment { nvrtc_path: Some("/nowhere/libnvrtc.so".into()), ..Environment::default() };
    let backend = CudaBackend::with(&environment).expect("a device needs no compiler");
    let mut call = Call::new(DType::Bf16, 4, 0);
    for error in [backend.check_compiler(), call.run(&backend, false)].map(|result| result.expect_err("no NVRTC")) {
        assert!(error.to_string().contains("pip install nvidia-cuda-nvrtc"), "{error}");
    }
    call.is_untouched();
}
