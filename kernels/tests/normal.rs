//! Normal numbers drawn on a GPU are the CPU's. Without a GPU the test says that it was skipped.
use kernels::ops::normal;
use support::{gpu, poison};
use tch::{Device, Kind};

#[allow(dead_code)] // the other tests use the rest
mod support;

#[test]
fn numbers_drawn_on_a_gpu_are_the_cpus() {
    let Some(gpu) = gpu("numbers_drawn_on_a_gpu_are_the_cpus") else {
        return;
    };
    for (first, count) in [(0, 1), (5_000_000_000, 3_000_001), (7, 255)] {
        let key = normal::key(3, "a weight");
        poison(gpu);
        let got = normal::draw(key, first, count, 0.006, gpu.device()).to_device(Device::Cpu);
        let want = normal::draw(key, first, count, 0.006, Device::Cpu);
        // f64 functions differ in their last bits: some FP32 value may lie beside another boundary.
        let differ = got.ne_tensor(&want).sum(Kind::Int64).int64_value(&[]);
        let error = (&got - &want).abs().max().double_value(&[]);
        assert!(differ <= 3 && error < 1e-9, "{count} from {first}: {differ} differ, by {error:e} at most");
    }
}
