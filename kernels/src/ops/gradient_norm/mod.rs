//! The global norm of the gradients and what it clips them by, without a wait of the host: one pass over each gradient,
//! summed in one order.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use tch::{Device, Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("gradient_norm.cu");
/// Blocks of a launch, whatever the GPU: the order of the sum is part of the result.
const BLOCKS: i64 = 1056;

fn source() -> Source {
    Source { name: "gradient_norm", text: TEXT.to_string(), defines: Vec::new() }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    vec![(source(), "sum_of_squares")]
}

/// Σ x² over all `gradients` (of one device) → [] f64 on that device.
pub fn sum_of_squares(gradients: &[&Tensor]) -> Tensor {
    let Some(first) = gradients.first() else {
        return Tensor::zeros([0; 0], (Kind::Double, Device::Cpu));
    };
    if !first.device().is_cuda() || first.kind() != Kind::Float {
        return cpu::sum_of_squares(gradients);
    }
    let gpu = device::gpu(first.device());
    let kernel = gpu.kernel("gradient_norm", "sum_of_squares", source).expect("our own kernels compile and load");
    let parts = Tensor::empty([gradients.len() as i64, BLOCKS], (Kind::Double, first.device()));
    for (index, gradient) in gradients.iter().enumerate() {
        let gradient = &aligned(gradient);
        Launch::new(gpu, &kernel)
            .tensor(gradient, Kind::Float)
            .tensor(&parts.get(index as i64), Kind::Double)
            .int(gradient.numel() as i64)
            .run(Shape { grid: [BLOCKS as usize, 1], block: 256, shared_bytes: 0 });
    }
    parts.sum(Kind::Double)
}

/// What the gradients are multiplied by so that their norm is at most `max_norm`: [1] FP32, on the device of `sum`. Not
/// a number where the norm is none: AdamW then changes nothing.
pub fn clip_factor(sum: &Tensor, max_norm: f64) -> Tensor {
    let norm = sum.sqrt();
    let nothing_or_nan = norm.fmod(1.0) * 0.0; // ∞ has no remainder
    ((norm.reciprocal() * max_norm).clamp_max(1.0) + nothing_or_nan).to_kind(Kind::Float).view([1])
}
