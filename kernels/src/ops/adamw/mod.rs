//! AdamW with decoupled weight decay (report §4.2), in place: in torch ops for any kind, and on the GPU in one pass that
//! also writes the weights the layers use.
use crate::device;
use crate::fp8::{Blocks, ScaleRule};
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use crate::ops::quantise::blocks;
use crate::ops::quantise::tiles::{self, every_tile, flag, rule_define};
use tch::{Kind, Tensor};

mod cpu;
pub use cpu::sum_of_squares;

const TEXT: &str = include_str!("adamw.cu");
/// Blocks of a pass over a tensor that has no tiles.
const MOST_BLOCKS: i64 = 1056;

#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// What one tensor's update reads and writes; all of one shape. Moments may be BF16, the maths is the master's.
pub struct State<'a> {
    pub master: &'a mut Tensor,
    pub first: &'a mut Tensor,
    pub second: &'a mut Tensor,
}

#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub lr: f64,
    /// Counts from 1.
    pub step: u64,
    /// Multiplies the gradient.
    pub clip: f64,
    /// False for norms and biases.
    pub decay: bool,
}

/// What the layers use of a master, written with it.
#[derive(Default)]
pub struct Outputs<'a> {
    /// BF16, of the master's shape.
    pub weight: Option<&'a Tensor>,
    pub fp8: Option<Fp8<'a>>,
}

/// Blocks of the new weight, rounded to BF16, and of its transpose, as `quantise::weights` gives them.
#[derive(Clone, Copy)]
pub struct Fp8<'a> {
    pub plain: &'a Blocks,
    pub transposed: &'a Blocks,
    pub rule: ScaleRule,
}

fn source(rule: ScaleRule, moments: Kind) -> Source {
    let moments = ("MOMENTS_FP32", flag(moments == Kind::Float));
    Source { name: "adamw", text: [tiles::TEXT, TEXT].concat(), defines: vec![rule_define(rule), moments] }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    let kinds = [Kind::BFloat16, Kind::Float];
    kinds.iter().flat_map(|&kind| [ScaleRule::Amax, ScaleRule::PowerOfTwo].map(|rule| (source(rule, kind), "adamw_blocks"))).collect()
}

impl AdamW {
    /// One pass: on the GPU over an FP32 master and gradient and BF16 or FP32 moments; other kinds in torch ops. The gradient
    /// is multiplied by `at.clip` and by `clip` [1] FP32 on the tensors' device; where that is not a number, nothing
    /// changes. [.., R, C] of multiples of 16 if FP8 is written.
    pub fn update_fused(&self, state: State, gradient: &Tensor, clip: &Tensor, out: Outputs, at: Step) {
        let moments = state.first.kind();
        // Rows of a shard may begin anywhere, and a thread moves 16 bytes.
        let begins = |tensor: &Tensor| (tensor.data_ptr() as usize).is_multiple_of(16);
        let places = [&*state.master, &*state.first, &*state.second].into_iter().chain(out.weight).all(begins);
        let fits = places && state.master.kind() == Kind::Float && matches!(moments, Kind::BFloat16 | Kind::Float);
        if !gradient.device().is_cuda() || !fits {
            return cpu::update_fused(self, state, gradient, clip, out, at);
        }
        let gradient = &aligned(gradient);
        let size = state.master.size();
        let gpu = device::gpu(gradient.device());
        let (entry, rule) = out.fp8.map_or(("adamw", ScaleRule::Amax), |fp8| ("adamw_blocks", fp8.rule));
        let key = format!("adamw/{rule:?}/{moments:?}");
        let kernel = gpu.kernel(&key, entry, || source(rule, moments)).expect("our own kernels compile and load");
        let correction = 1.0 / (1.0 - self.beta2.powf(at.step as f64)).sqrt();
        let step_size = at.lr / (1.0 - self.beta1.powf(at.step as f64));
        let decay = if at.decay { 1.0 - at.lr * self.weight_decay } else { 1.0 };
        let mut launch = Launch::new(gpu, &kernel)
            .tensor(state.master, Kind::Float)
            .tensor(state.first, moments)
            .tensor(state.second, moments)
            .tensor(gradient, Kind::Float)
            .tensor_or_null(out.weight, Kind::BFloat16)
            .tensor(clip, Kind::Float)
            .float(at.clip as f32);
        for value in [self.beta1, self.beta2, self.eps, decay, step_size, correction] {
            launch = launch.float(value as f32);
        }
        let Some(Fp8 { plain, transposed, .. }) = out.fp8 else {
            let count = gradient.numel() as i64;
            let num_blocks = ((count + 2047) / 2048).min(MOST_BLOCKS) as usize;
            return launch.int(count).run(Shape { grid: [num_blocks, 1], block: tiles::THREADS, shared_bytes: 0 });
        };
        let (r, c) = (size[size.len() - 2], size[size.len() - 1]);
        assert!(r % 16 == 0 && c % 16 == 0, "weights of {size:?}: both sides are multiples of 16");
        blocks(launch, plain, transposed).int(r).int(c).run(every_tile(&size));
    }
}
