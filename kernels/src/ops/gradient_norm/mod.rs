//! The global norm of the gradients, without a wait of the host: one pass over each gradient,
//! summed in one order; the last addition of what ranks made of it is done in that pass.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use crate::ops::adamw;
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
    vec![(source(), "add_and_square")]
}

/// Σ x² over all `gradients` (of one device) → [] f64 on that device.
pub fn sum_of_squares(gradients: &[&Tensor]) -> Tensor {
    let Some(first) = gradients.first() else {
        return Tensor::zeros([0; 0], (Kind::Double, Device::Cpu));
    };
    if !first.device().is_cuda() || first.kind() != Kind::Float {
        return cpu::sum_of_squares(gradients);
    }
    let mut squares = Squares::default();
    gradients.iter().for_each(|gradient| squares.take(gradient));
    squares.total()
}

/// Σ x² under way, one gradient after the other.
#[derive(Default)]
pub struct Squares(Vec<Tensor>);

impl Squares {
    pub fn take(&mut self, gradient: &Tensor) {
        self.0.push(match on_gpu(gradient) {
            true => squares("sum_of_squares", &aligned(gradient), None),
            false => Tensor::from_slice(&[adamw::sum_of_squares(gradient)]).to_device(gradient.device()),
        });
    }

    /// `gradient` += `more`, in the same pass.
    pub fn add_and_take(&mut self, gradient: &mut Tensor, more: &Tensor) {
        assert_eq!(gradient.size(), more.size(), "two terms of one gradient");
        let fits = |x: &Tensor| x.is_contiguous() && (x.data_ptr() as usize).is_multiple_of(16);
        if on_gpu(gradient) && fits(gradient) && fits(more) {
            return self.0.push(squares("add_and_square", gradient, Some(more)));
        }
        let _ = gradient.g_add_(more);
        self.take(gradient)
    }

    /// [] f64, on the gradients' device.
    pub fn total(&self) -> Tensor {
        match &self.0[..] {
            [] => Tensor::from(0f64),
            parts => Tensor::cat(parts, 0).sum(Kind::Double),
        }
    }
}

fn on_gpu(gradient: &Tensor) -> bool {
    gradient.device().is_cuda() && gradient.kind() == Kind::Float
}

/// A sum for each block.
fn squares(name: &'static str, gradient: &Tensor, more: Option<&Tensor>) -> Tensor {
    let gpu = device::gpu(gradient.device());
    let kernel = gpu.kernel("gradient_norm", name, source).expect("our own kernels compile and load");
    let parts = Tensor::empty([BLOCKS], (Kind::Double, gradient.device()));
    let launch = Launch::new(gpu, &kernel).tensor(gradient, Kind::Float);
    let launch = if let Some(more) = more { launch.tensor(more, Kind::Float) } else { launch };
    let launch = launch.tensor(&parts, Kind::Double).int(gradient.numel() as i64);
    launch.run(Shape { grid: [BLOCKS as usize, 1], block: 256, shared_bytes: 0 });
    parts
}
