//! SwiGLU feed-forward, gate and up packed in one matrix: the dense blocks' and the shared experts'.
//!
//! Legend: T tokens, D hidden size, I intermediate size.
use crate::linear::{Linear, LinearWork};
use crate::operand::Operand;
use crate::swiglu::{self, SwigluSaved};
use crate::{Grads, Layer, ModelConfig, ParamTable, Recompute, Weights};
use tch::Tensor;

#[derive(Debug)]
pub struct Mlp {
    pub gate_up: Linear, // [2I, D]
    down: Linear,    // [D, I]
    recompute: Recompute,
}

pub struct MlpGrad {
    pub dy: Tensor, // [T, D]
    /// The input again, which its maker kept or made again.
    pub x: Operand,
}

/// Those of `gate_up` and `down`.
pub type MlpWork = [LinearWork; 2];

impl Mlp {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str, width: i64) -> Self {
        let gate_up = table.matrix(format!("{prefix}.gate_up_proj.weight"), &[2 * width, config.hidden_size], config);
        let down = table.matrix(format!("{prefix}.down_proj.weight"), &[config.hidden_size, width], config);
        Mlp { gate_up: Linear { weight: gate_up }, down: Linear { weight: down }, recompute: table.recompute }
    }
}

/// Backward, between `down` and `gate_up`.
pub struct MlpHalf {
    x: Operand,
    dgate_up: Operand,
    down: LinearWork,
}

/// In halves, for who has something to do between them.
impl Mlp {
    /// x [T, D] → gate and up, [T, 2I]
    pub fn forward_up(&self, w: &Weights, x: Operand) -> Tensor {
        self.gate_up.forward(w, x).0
    }
    /// [T, 2I] → [T, D]
    pub fn forward_down(&self, w: &Weights, gate_up: Tensor) -> (Tensor, SwigluSaved) {
        let (activation, saved) = swiglu::forward(w, gate_up, None, (self.down.weight, self.recompute.swiglu));
        (self.down.forward(w, activation).0, saved)
    }
    pub fn backward_project(&self, w: &Weights, MlpGrad { dy, x }: MlpGrad, saved: SwigluSaved) -> MlpHalf {
        let (dactivation, dy) = x.gradient(w, dy, self.down.weight).backward_input(w, self.down.weight);
        let d = swiglu::backward(w, dactivation, saved, None, self.gate_up.weight);
        MlpHalf { x, dgate_up: d.gate_up, down: LinearWork { dy, x: d.out } }
    }
    /// → [T, D]
    pub fn backward_activate(&self, w: &Weights, MlpHalf { x, dgate_up, down }: MlpHalf) -> (Tensor, MlpWork) {
        let (dx, dgate_up) = dgate_up.backward_input(w, self.gate_up.weight);
        (dx, [LinearWork { dy: dgate_up, x }, down])
    }
}

impl Layer for Mlp {
    type In = Operand; // [T, D]
    type Out = Tensor; // [T, D]
    type DOut = MlpGrad;
    type DIn = Tensor;
    type Saved = SwigluSaved;
    type WeightWork = MlpWork;

    fn forward(&self, w: &Weights, x: Operand) -> (Tensor, SwigluSaved) {
        let gate_up = self.forward_up(w, x);
        self.forward_down(w, gate_up)
    }
    fn backward_input(&self, w: &Weights, grad: MlpGrad, saved: SwigluSaved) -> (Tensor, MlpWork) {
        let half = self.backward_project(w, grad, saved);
        self.backward_activate(w, half)
    }
    fn backward_weight(&self, [up, down]: MlpWork, grads: &mut Grads) {
        self.down.backward_weight(down, grads);
        self.gate_up.backward_weight(up, grads);
    }
}
