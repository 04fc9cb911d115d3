//! What the tests on a GPU share.
use kernels::device::{self, Found, Gpu, Options};
use tch::{Device, Kind, Tensor};

pub fn gpu(test: &str) -> Option<&'static Gpu> {
    let kernel_cache = std::env::temp_dir().join("tiefsee-test-kernels");
    let options = Options { local_rank: 0, torch_cuda: None, nvrtc_folder: None, kernel_cache, spared_sms: 0 };
    match device::open(&options).expect("a GPU that is there must be usable") {
        Found::Gpu(gpu) => Some(gpu),
        Found::Cpu(why) => {
            println!("SKIPPED {test}: {why}");
            None
        }
    }
}

pub fn random(gpu: &Gpu, size: &[i64], mean: f64) -> Tensor {
    (Tensor::randn(size, (Kind::Float, gpu.device())) + mean).to_kind(Kind::BFloat16)
}

/// Leaves NaN in torch's cache of freed memory, where the next outputs are allocated: what nobody writes shows.
pub fn poison(gpu: &Gpu) {
    for bytes in [1 << 20, 4 << 20, 64 << 20, 512 << 20] {
        drop(Tensor::full([bytes], 255, (Kind::Uint8, gpu.device())));
    }
}

pub fn counts_tensor(gpu: &Gpu, counts: &[i64]) -> Tensor {
    Tensor::from_slice(counts).to_kind(Kind::Int).to_device(gpu.device())
}

pub fn same(a: &Tensor, b: &Tensor) -> bool {
    let bytes = |t: &Tensor| t.to_device(Device::Cpu).contiguous().view(-1).view_dtype(Kind::Uint8);
    a.size() == b.size() && bytes(a).equal(&bytes(b))
}
