//! The global norm of the gradients, without a wait of the host: one pass over each gradient,
//! summed in one order; what ranks made of it is added up in that pass.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use crate::ops::adamw;
use tch::{Device, Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("gradient_norm.cu");
/// Blocks of a launch, whatever the GPU: the order of the sum is part of the result.
const BLOCKS: i64 = 1056;

fn source(others: usize) -> Source {
    Source { name: "gradient_norm", text: TEXT.to_string(), defines: vec![("OTHERS", others.to_string())] }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    [1, 3, 7, 255].into_iter().map(|others| (source(others), "add_and_square")).collect()
}

/// What every rank made of one gradient. The sum is made in `first`: the rest is given back before the sums are used.
pub struct Parts {
    pub own: Tensor,
    /// This rank among all.
    pub rank: usize,
    /// The first of the others', as own.
    pub first: Tensor,
    /// The further ones', each a row, wide enough for a row to start at 16 bytes: [ranks − 2, at least own's elements].
    pub rest: Tensor,
}

impl Parts {
    /// Places for what the others make; `room` makes one of a shape, of own's kind and where own is.
    pub fn of<E>(own: Tensor, (rank, ranks): (usize, usize), room: impl Fn(&[i64]) -> Result<Tensor, E>) -> Result<Parts, E> {
        assert!(ranks > 1 && rank < ranks, "rank {rank} of {ranks} adds up others' parts");
        let rest = room(&[ranks as i64 - 2, (own.numel() as i64 + 3) / 4 * 4])?;
        Ok(Parts { first: room(&own.size())?, own, rank, rest })
    }

    fn others(&self) -> usize {
        self.rest.size()[0] as usize + 1
    }

    /// Of the `other`-th of the others, in rank order; own's shape.
    pub fn place(&self, other: usize) -> Tensor {
        match other {
            0 => self.first.shallow_clone(),
            _ => self.rest.get(other as i64 - 1).narrow(0, 0, self.own.numel() as i64).view(&self.own.size()[..]),
        }
    }
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
            true => squares(&aligned(gradient)),
            false => Tensor::from_slice(&[adamw::sum_of_squares(gradient)]).to_device(gradient.device()),
        });
    }

    /// The parts' sum, added up in rank order, in the same pass.
    pub fn add_and_take(&mut self, parts: Parts) -> Tensor {
        let fits = |x: &Tensor| x.is_contiguous() && (x.data_ptr() as usize).is_multiple_of(16);
        if on_gpu(&parts.own) && fits(&parts.own) {
            self.0.push(add_and_square(&parts));
        } else {
            cpu::add(&parts);
            self.take(&parts.first);
        }
        parts.first
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

const SHAPE: Shape = Shape { grid: [BLOCKS as usize, 1], block: 256, shared_bytes: 0 };

/// A sum for each block.
fn squares(gradient: &Tensor) -> Tensor {
    let gpu = device::gpu(gradient.device());
    let kernel = gpu.kernel("gradient_norm/1", "sum_of_squares", || source(1)).expect("our own kernels compile and load");
    let sums = Tensor::empty([BLOCKS], (Kind::Double, gradient.device()));
    Launch::new(gpu, &kernel).tensor(gradient, Kind::Float).tensor(&sums, Kind::Double).int(gradient.numel() as i64).run(SHAPE);
    sums
}

fn add_and_square(parts: &Parts) -> Tensor {
    let (gpu, others) = (device::gpu(parts.own.device()), parts.others());
    let kernel = gpu.kernel(&format!("gradient_norm/{others}"), "add_and_square", || source(others)).expect("our own kernels compile and load");
    let sums = Tensor::empty([BLOCKS], (Kind::Double, parts.own.device()));
    let launch = Launch::new(gpu, &kernel).tensor(&parts.first, Kind::Float).tensor(&parts.rest, Kind::Float).tensor(&parts.own, Kind::Float);
    let launch = launch.tensor(&sums, Kind::Double).int(parts.rank as i64);
    launch.int(parts.own.numel() as i64).int(parts.rest.size()[1]).run(SHAPE);
    sums
}
