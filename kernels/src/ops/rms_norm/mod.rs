//! RMSNorm over the last dim: y = w · x / sqrt(mean(x²) + eps), in torch ops for any kind, and fused with the quantiser
//! for the FP8 linear behind it.
//!
//! Legend: T tokens, D width.
use crate::device::{self, Kernel};
use crate::fp8::{Rows, ScaleRule, round_up};
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use crate::ops::quantise::tiles::{self, Quantised, Want, rule_define, shape, strides, tiles_of};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("rms_norm.cu");
/// Blocks of the backward pass, whatever the GPU: the order of the weight's gradient is part of the result.
const BLOCKS: i64 = 132;
/// The widest row that backward's block of threads holds, eight columns each.
const WIDEST: i64 = 7168;
/// Columns of a row that a warp of `by_rows` holds, and its blocks' threads at least and at most: HELD and MOST_THREADS there.
const HELD_BY_WARP: i64 = 8 * 8 * 32;
const BLOCK: i64 = 128;
const MOST_THREADS: i64 = 512;

/// Backward's threads of a row of `d`, and rows at a time: with more than 768 threads registers get short.
fn backward_threads(d: i64) -> [i64; 2] {
    let row = round_up((d + 7) / 8, 32);
    [row, (768 / row).clamp(1, 8)]
}

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

fn source(rule: ScaleRule, d: i64) -> Source {
    let [row, rows] = backward_threads(d);
    let defines = vec![rule_define(rule), ("ROW", row.to_string()), ("ROWS", rows.to_string())];
    Source { name: "rms_norm", text: [tiles::TEXT, TEXT].concat(), defines }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    let variants = [(ScaleRule::Amax, 512), (ScaleRule::Amax, 1536), (ScaleRule::Amax, WIDEST), (ScaleRule::PowerOfTwo, 512)];
    variants.into_iter().map(|(rule, d)| (source(rule, d), "backward")).collect()
}

/// `d` matters to backward alone: one compilation for each number of threads.
fn kernel(device: Device, entry: &str, rule: ScaleRule, d: i64) -> Arc<Kernel> {
    let key = format!("rms_norm/{rule:?}/{:?}", backward_threads(d));
    let source = || source(rule, d);
    device::gpu(device).kernel(&key, entry, source).expect("our own kernels compile and load")
}

/// Whether the CUDA kernels take it: BF16 rows of whole sixteens, not wider than a block holds.
fn on_gpu(x: &Tensor) -> bool {
    let d = x.size()[x.dim() - 1];
    x.device().is_cuda() && x.dim() == 2 && x.kind() == Kind::BFloat16 && d % 16 == 0 && d <= MOST_THREADS / 32 * HELD_BY_WARP
}

/// x [T, D], weight [D] → y [T, D] and rstd [T, 1], which backward needs beside x.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    if !on_gpu(x) {
        let rstd = cpu::rstd(x, eps);
        return (cpu::normed(x, &rstd, weight), rstd);
    }
    assert_eq!(weight.size1().expect("the weight is [D]"), x.size()[1], "the weight's width");
    let (x, y) = (aligned(x), Tensor::empty(x.size(), (x.kind(), x.device())));
    let rstd = by_rows(&x, Beside { weight: Some(weight), bf16: Some(&y), ..Beside::default() }, ScaleRule::Amax, eps);
    (y, rstd)
}

/// x [T, D] with its rstd → y [T, D].
pub fn normed(x: &Tensor, rstd: &Tensor, weight: &Tensor) -> Tensor {
    if !on_gpu(x) {
        return cpu::normed(x, rstd, weight);
    }
    let make = Make { want: Want { rows: false, columns: false }, bf16: true, rule: ScaleRule::Amax };
    quantised(x, rstd, weight, make).y.expect("bf16 was wanted")
}

/// dy [T, D] → (dx [T, D], dweight [D] in the statistics' kind).
pub fn backward(dy: &Tensor, x: &Tensor, rstd: &Tensor, weight: &Tensor) -> (Tensor, Tensor) {
    backward_add(dy, x, rstd, weight, None)
}

/// The same with `add` [T, D], the gradient of the residual path beside the norm, added to dx in the same pass.
pub fn backward_add(dy: &Tensor, x: &Tensor, rstd: &Tensor, weight: &Tensor, add: Option<&Tensor>) -> (Tensor, Tensor) {
    if !on_gpu(x) || x.size()[1] > WIDEST {
        return cpu::backward(dy, x, rstd, weight, add);
    }
    let (t, d) = x.size2().expect("x is [T, D]");
    let (dy, x) = (dy.contiguous(), x.contiguous());
    let dx = x.empty_like();
    let blocks = BLOCKS.min(t);
    let parts = Tensor::empty([blocks, d], (Kind::Float, x.device()));
    let dweight = Tensor::empty([d], (Kind::Float, x.device()));
    let gpu = device::gpu(x.device());
    let [row, rows] = backward_threads(d);
    let add = add.map(aligned);
    Launch::new(gpu, &kernel(x.device(), "backward", ScaleRule::Amax, d))
        .early()
        .tensor(&dy, Kind::BFloat16)
        .tensor(&x, Kind::BFloat16)
        .tensor(rstd, Kind::Float)
        .tensor(weight, Kind::BFloat16)
        .tensor_or_null(add.as_ref(), Kind::BFloat16)
        .tensor(&dx, Kind::BFloat16)
        .tensor(&parts, Kind::Float)
        .int(t)
        .int(d)
        .run(Shape { grid: [blocks as usize, 1], block: (row * rows) as usize, shared_bytes: 0 });
    Launch::new(gpu, &kernel(x.device(), "sum_parts", ScaleRule::Amax, d))
        .early()
        .tensor(&parts, Kind::Float)
        .tensor(&dweight, Kind::Float)
        .int(blocks)
        .int(d)
        .run(shape((d + 31) / 32, 1));
    (dx, dweight)
}

/// The residual sum x + y [T, D], and its rstd [T, 1] from the same pass.
pub fn add(x: &Tensor, y: &Tensor, eps: f64) -> (Tensor, Tensor) {
    assert_eq!(x.size(), y.size(), "the two sides of a residual sum");
    if !on_gpu(x) {
        return cpu::add(x, y, eps);
    }
    let sum = Tensor::empty(x.size(), (x.kind(), x.device()));
    let rstd = by_rows(&aligned(x), Beside { sum: Some([&aligned(y), &sum]), ..Beside::default() }, ScaleRule::Amax, eps);
    (sum, rstd)
}

/// What a pass over rows makes beside their rstd.
#[derive(Default)]
struct Beside<'a> {
    /// (y, sum): x + y, whose rstd it is then.
    sum: Option<[&'a Tensor; 2]>,
    /// x normed by it, in one of:
    weight: Option<&'a Tensor>,
    bf16: Option<&'a Tensor>,
    fp8: Option<&'a Rows>,
}

fn by_rows(x: &Tensor, made: Beside, rule: ScaleRule, eps: f64) -> Tensor {
    let (t, d) = x.size2().expect("x is [T, D]");
    let rstd = Tensor::empty([t, 1], (Kind::Float, x.device()));
    let kernel = kernel(x.device(), "by_rows", rule, 1);
    let threads = 32 * ((d + HELD_BY_WARP - 1) / HELD_BY_WARP).max(1);
    let at_a_time = (BLOCK / threads).max(1);
    Launch::new(device::gpu(x.device()), &kernel)
        .early()
        .tensor(x, Kind::BFloat16)
        .tensor_or_null(made.sum.map(|[y, _]| y), Kind::BFloat16)
        .tensor_or_null(made.sum.map(|[_, sum]| sum), Kind::BFloat16)
        .tensor_or_null(made.weight, Kind::BFloat16)
        .tensor_or_null(made.bf16, Kind::BFloat16)
        .tensor_or_null(made.fp8.map(|rows| &rows.values), Kind::Float8e4m3fn)
        .tensor_or_null(made.fp8.map(|rows| &rows.scales), Kind::Float)
        .tensor(&rstd, Kind::Float)
        .float(eps as f32)
        .int(t)
        .int(d)
        .int(round_up(t, 4))
        .int(threads)
        .run(Shape { grid: [((t + at_a_time - 1) / at_a_time) as usize, 1], block: (at_a_time * threads) as usize, shared_bytes: 0 });
    rstd
}

/// x [T, D] with its rstd [T, 1], weight [D], all BF16, D a multiple of 16 → the normed rows, rounded to BF16 on the way.
pub fn quantised(x: &Tensor, rstd: &Tensor, weight: &Tensor, make: Make) -> Normed {
    let Device::Cuda(_) = x.device() else {
        return cpu::quantised(x, rstd, weight, make);
    };
    let (t, d) = x.size2().expect("x is [T, D]");
    assert_eq!(weight.size1().expect("the weight is [D]"), d, "the weight's width");
    let x = x.contiguous();
    let quantised = Quantised::empty([t, d], 1, make.want, x.device());
    let y = make.bf16.then(|| x.empty_like());
    let kernel = kernel(x.device(), "rms_norm", make.rule, 1);
    let launch = Launch::new(device::gpu(x.device()), &kernel)
        .early()
        .tensor(&x, Kind::BFloat16)
        .tensor(rstd, Kind::Float)
        .tensor(weight, Kind::BFloat16)
        .tensor_or_null(y.as_ref(), Kind::BFloat16);
    let launch = quantised.tensors(launch).int(t).int(d);
    strides(launch, [t, d], 1).run(shape(tiles_of(d), tiles_of(t)));
    Normed { quantised, y }
}

/// As `quantised`, by x's own statistics: with rstd [T, 1]. By rows alone it is one pass.
pub fn forward_quantised(x: &Tensor, weight: &Tensor, eps: f64, make: Make) -> (Normed, Tensor) {
    if !on_gpu(x) {
        let rstd = cpu::rstd(x, eps);
        return (quantised(x, &rstd, weight, make), rstd);
    }
    let (x, (t, d)) = (aligned(x), x.size2().expect("x is [T, D]"));
    assert_eq!(weight.size1().expect("the weight is [D]"), d, "the weight's width");
    if make.want != Want::ROWS || make.bf16 {
        let rstd = by_rows(&x, Beside::default(), ScaleRule::Amax, eps);
        return (quantised(&x, &rstd, weight, make), rstd);
    }
    let quantised = Quantised::empty([t, d], 1, make.want, x.device());
    let rstd = by_rows(&x, Beside { weight: Some(weight), fp8: quantised.rows.as_ref(), ..Beside::default() }, make.rule, eps);
    (Normed { quantised, y: None }, rstd)
}
