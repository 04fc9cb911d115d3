//! Softmax cross-entropy: the loss and its gradient in one pass over the logits, so that neither the logits nor
//! a second copy of them live until backward.
//!
//! Legend: T tokens, V vocabulary.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape};
use tch::{Device, Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("cross_entropy.cu");
/// Blocks that share a row, and the most bytes one of them has for it.
const PARTS: i64 = 4;
const MOST_BYTES: i64 = 224 * 1024;

fn source() -> Source {
    Source { name: "cross_entropy", text: TEXT.to_string(), defines: Vec::new() }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    vec![(source(), "cross_entropy")]
}

/// logits [T, V], targets [T] i64 → Σ over tokens of the loss, in at least FP32; d(Σ loss)/dlogits is written to
/// `dlogits` [T, V], of the logits' kind; the two may share their memory. What the loss is scaled by is the caller's: a
/// product with the hidden state is narrower than the logits, and −1 is a number of BF16: −scale would be rounded the same
/// way for every target, up to 0.4 % off what the softmax beside it is rounded to on average.
pub fn forward(logits: Tensor, targets: &Tensor, dlogits: &mut Tensor) -> Tensor {
    let (t, v) = logits.size2().expect("logits are [T, V]");
    let part = crate::fp8::round_up((v + PARTS - 1) / PARTS, 8);
    let fits = logits.kind() == Kind::BFloat16 && v % 8 == 0 && 2 * part <= MOST_BYTES;
    let Device::Cuda(_) = logits.device() else {
        return cpu::forward(logits, targets, dlogits);
    };
    if !fits {
        return cpu::forward(logits, targets, dlogits);
    }
    let losses = Tensor::empty([t], (Kind::Float, logits.device()));
    let gpu = device::gpu(logits.device());
    let kernel = gpu.kernel("cross_entropy", "cross_entropy", source).expect("our own kernels compile and load");
    Launch::new(gpu, &kernel)
        .tensor(&logits, Kind::BFloat16)
        .tensor(targets, Kind::Int64)
        .tensor(dlogits, Kind::BFloat16)
        .tensor(&losses, Kind::Float)
        .int(v)
        .int(part)
        .run(Shape { grid: [(t * PARTS) as usize, 1], block: 512, shared_bytes: 2 * part as usize });
    losses.sum(Kind::Float)
}
