//! A device whose memory is full. Alone in its process: nobody else finds room meanwhile.

mod call;

use call::Call;
use fsa_core::{DType, Error};
use fsa_cuda::CudaBackend;
use fsa_cuda::driver::DeviceBuffer;

#[test]
#[ignore = "needs a CUDA device"]
fn a_full_device_is_an_error_that_names_the_tensor_and_writes_nothing() {
    let backend = CudaBackend::new().expect("a device");
    // Kernels are loaded while there is room.
    Call::new(DType::Bf16, 4, 0).run(&backend, false).expect("fits");
    let mut held = Vec::new();
    for shift in (21..=40).rev() {
        while let Ok(buffer) = DeviceBuffer::new(backend.kernels().device(), "ballast", 1 << shift) {
            held.push(buffer);
        }
    }
    let mut call = Call::new(DType::Bf16, 1 << 20, 0);
    let error = call.run(&backend, false).expect_err("full");
    assert!(matches!(&error, Error::OutOfMemory { what, .. } if what.ends_with(" on the device")), "{error}");
    call.is_untouched();
    drop(held);
    call.run(&backend, false).expect("there is room again");
}
