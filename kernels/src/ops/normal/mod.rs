//! Normal numbers by their place: the i-th of a key is a function of the two alone, so whoever draws a part of a tensor gets
//! that part of the whole. FP32 of what is computed in f64: CPU and GPU differ in a last bit now and then.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape};
use tch::{Device, Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("normal.cu");
const THREADS: i64 = 256;
/// Of a launch: enough for any GPU.
const MOST_BLOCKS: i64 = 1056;

fn source() -> Source {
    Source { name: "normal", text: TEXT.to_string(), defines: Vec::new() }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    vec![(source(), "normal")]
}

/// The key of a seed and a name: FNV-1a of the name, mixed with the seed.
pub fn key(seed: u64, name: &str) -> u64 {
    cpu::mix(seed ^ name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3)))
}

/// Numbers `first` to `first + count` of `key`, times `std`: [count] FP32 on `device`.
pub fn draw(key: u64, first: u64, count: i64, std: f64, device: Device) -> Tensor {
    if !device.is_cuda() {
        return Tensor::from_slice(&cpu::draw(key, first, count as usize, std));
    }
    let gpu = device::gpu(device);
    let kernel = gpu.kernel("normal", "normal", source).expect("our own kernels compile and load");
    let of = Tensor::from_slice(&[key as i64, first as i64, std.to_bits() as i64]).to_device(device);
    let out = Tensor::empty([count], (Kind::Float, device));
    Launch::new(gpu, &kernel).tensor(&out, Kind::Float).tensor(&of, Kind::Int64).int(count).run(Shape {
        grid: [(count as u64).div_ceil(THREADS as u64).min(MOST_BLOCKS as u64) as usize, 1],
        block: THREADS as usize,
        shared_bytes: 0,
    });
    out
}
