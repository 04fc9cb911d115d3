//! RMSNorm over the last dim: y = w · x / sqrt(mean(x²) + eps), in torch ops for any kind, and fused with the quantiser
//! for the FP8 linear behind it.
//!
//! Legend: T tokens, D width.
use crate::device::{self, Kernel};
use crate::fp8::ScaleRule;
use crate::jit::Source;
use crate::launch::{Launch, Shape};
use crate::ops::quantise::tiles::{self, Quantised, Want, flag, rule_define, shape, strides, tiles_of};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

mod cpu;
pub use cpu::{backward, forward};

const TEXT: &str = include_str!("rms_norm.cu");

/// What is made of the normed rows.
#[derive(Clone, Copy, Debug)]
pub struct Make {
    pub want: Want,
    /// BF16 too: for a gate, or anything else that takes no FP8.
    pub bf16: bool,
    pub rule: ScaleRule,
}

pub struct Normed {
    pub quantised: Quantised,
    /// [T, D] BF16.
    pub y: Option<Tensor>,
}

fn source(weight: Kind, rule: ScaleRule) -> Source {
    let defines = vec![rule_define(rule), ("WEIGHT_FP32", flag(weight == Kind::Float))];
    Source { name: "rms_norm", text: [tiles::TEXT, TEXT].concat(), defines }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    let rules = [ScaleRule::Amax, ScaleRule::PowerOfTwo];
    rules.iter().flat_map(|&rule| [Kind::BFloat16, Kind::Float].map(|kind| (source(kind, rule), "rms_norm"))).collect()
}

fn kernel(device: Device, entry: &str, weight: Kind, rule: ScaleRule) -> Arc<Kernel> {
    let key = format!("rms_norm/{weight:?}/{rule:?}");
    device::gpu(device).kernel(&key, entry, || source(weight, rule)).expect("our own kernels compile and load")
}

/// x [T, D] BF16 → rstd [T, 1] FP32. D is a multiple of 8.
pub fn statistics(x: &Tensor, eps: f64) -> Tensor {
    let Device::Cuda(_) = x.device() else {
        return cpu::rstd(x, eps);
    };
    on_gpu_statistics(x, None, eps)
}

/// The residual sum x + y [T, D] BF16, and its rstd [T, 1] FP32 from the same pass.
pub fn add(x: &Tensor, y: &Tensor, eps: f64) -> (Tensor, Tensor) {
    assert_eq!(x.size(), y.size(), "the two sides of a residual sum");
    let Device::Cuda(_) = x.device() else {
        return cpu::add(x, y, eps);
    };
    let sum = x.empty_like();
    let rstd = on_gpu_statistics(x, Some((y, &sum)), eps);
    (sum, rstd)
}

fn on_gpu_statistics(x: &Tensor, add: Option<(&Tensor, &Tensor)>, eps: f64) -> Tensor {
    let (t, d) = x.size2().expect("x is [T, D]");
    assert!(d % 8 == 0, "{d} columns: a thread reads eight");
    let rstd = Tensor::empty([t, 1], (Kind::Float, x.device()));
    let kernel = kernel(x.device(), "statistics", Kind::BFloat16, ScaleRule::Amax);
    Launch::new(device::gpu(x.device()), &kernel)
        .tensor(x, Kind::BFloat16)
        .tensor_or_null(add.map(|(y, _)| y), Kind::BFloat16)
        .tensor_or_null(add.map(|(_, sum)| sum), Kind::BFloat16)
        .tensor(&rstd, Kind::Float)
        .float(eps as f32)
        .int(d)
        .run(Shape { grid: [t as usize, 1], block: 128, shared_bytes: 0 });
    rstd
}

/// x [T, D] BF16 with its rstd [T, 1], weight [D] BF16 or FP32, D a multiple of 16 → the normed rows, rounded to BF16 on
/// the way.
pub fn quantised(x: &Tensor, rstd: &Tensor, weight: &Tensor, make: Make) -> Normed {
    let Device::Cuda(_) = x.device() else {
        return cpu::quantised(x, rstd, weight, make);
    };
    let (t, d) = x.size2().expect("x is [T, D]");
    assert_eq!(weight.size1().expect("the weight is [D]"), d, "the weight's width");
    let quantised = Quantised::empty([t, d], 1, make.want, x.device());
    let y = make.bf16.then(|| x.empty_like());
    let kernel = kernel(x.device(), "rms_norm", weight.kind(), make.rule);
    let launch = Launch::new(device::gpu(x.device()), &kernel)
        .tensor(x, Kind::BFloat16)
        .tensor(rstd, Kind::Float)
        .tensor(weight, if weight.kind() == Kind::Float { Kind::Float } else { Kind::BFloat16 })
        .tensor_or_null(y.as_ref(), Kind::BFloat16);
    let launch = quantised.tensors(launch).int(t).int(d);
    strides(launch, [t, d], 1).run(shape(tiles_of(d), tiles_of(t)));
    Normed { quantised, y }
}
