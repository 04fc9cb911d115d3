//! AdamW with decoupled weight decay; the update of one tensor, in place (report §4.2).
use tch::{Kind, Tensor};

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

impl AdamW {
    /// `step` counts from 1; `clip` multiplies the gradient; `decay` is false for norms and biases.
    pub fn update(&self, state: State, gradient: &Tensor, clip: f64, at: Step) {
        let kind = state.master.kind();
        let gradient = if clip == 1.0 { gradient.to_kind(kind) } else { gradient.to_kind(kind) * clip };
        let mut first = state.first.to_kind(kind) * self.beta1;
        let _ = first.g_add_(&(&gradient * (1.0 - self.beta1)));
        let mut second = state.second.to_kind(kind) * self.beta2;
        let _ = second.addcmul_(&gradient, &(&gradient * (1.0 - self.beta2)));
        let correction1 = 1.0 - self.beta1.powi(at.step as i32);
        let correction2 = (1.0 - self.beta2.powi(at.step as i32)).sqrt();
        let denominator = second.sqrt() / correction2 + self.eps;
        if at.decay && self.weight_decay != 0.0 {
            let _ = state.master.g_mul_scalar_(1.0 - at.lr * self.weight_decay);
        }
        let _ = state.master.g_sub_(&(&first / denominator * (at.lr / correction1)));
        state.first.copy_(&first);
        state.second.copy_(&second);
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub lr: f64,
    pub step: u64,
    pub decay: bool,
}

/// Σ x² of a tensor in f64: one number, the same however the caller adds the tensors up.
pub fn sum_of_squares(gradient: &Tensor) -> Tensor {
    gradient.to_kind(Kind::Double).square().sum(Kind::Double)
}
