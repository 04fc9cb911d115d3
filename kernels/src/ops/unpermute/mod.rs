//! Rows of experts back to their tokens, summed: the end of a mixture of experts, and the backward of a gathered
//! quantisation.
//!
//! Legend: R rows, T tokens, K rows a token, D width.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape};
use tch::{Device, Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("unpermute.cu");

fn source() -> Source {
    Source { name: "unpermute", text: TEXT.to_string(), defines: Vec::new() }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    vec![(source(), "unpermute")]
}

/// rows [R, D] BF16, index [T, K] i32 (−1: none), add up to two [T, D] BF16 → Σ add[t] + Σ over k of rows[index[t, k]],
/// [T, D] BF16, summed in FP32 in this order.
pub fn forward(rows: &Tensor, index: &Tensor, add: &[&Tensor]) -> Tensor {
    let out = Tensor::empty([index.size()[0], rows.size()[1]], (Kind::BFloat16, rows.device()));
    forward_into(&out, rows, index, add);
    out
}

/// As `forward`, into `out` [T, D] BF16.
pub fn forward_into(out: &Tensor, rows: &Tensor, index: &Tensor, add: &[&Tensor]) {
    assert!(add.len() <= 2, "{} tensors to add", add.len());
    let ((_, d), (t, k)) = (rows.size2().expect("rows are [R, D]"), index.size2().expect("index is [T, K]"));
    assert_eq!(out.size(), [t, d], "a place for every sum");
    let Device::Cuda(_) = rows.device() else {
        return out.shallow_clone().copy_(&cpu::forward(rows, index, add));
    };
    assert!(d % 8 == 0, "{d} columns: a thread moves eight");
    let gpu = device::gpu(rows.device());
    let kernel = gpu.kernel("unpermute", "unpermute", source).expect("our own kernels compile and load");
    Launch::new(gpu, &kernel)
        .tensor(rows, Kind::BFloat16)
        .tensor(index, Kind::Int)
        .tensor_or_null(add.first().copied(), Kind::BFloat16)
        .tensor_or_null(add.get(1).copied(), Kind::BFloat16)
        .tensor(out, Kind::BFloat16)
        .int(k)
        .int(d)
        .run(Shape { grid: [t as usize, 1], block: 128, shared_bytes: 0 });
}
