//! SwiGLU feed-forward, gate and up packed in one matrix: the dense blocks' and the shared experts'.
//!
//! Legend: T tokens, D hidden size, I intermediate size.
use crate::linear::{Linear, LinearWork};
use crate::{Grads, Layer, ModelConfig, ParamTable, Weights};
use kernels::ops::swiglu;
use tch::Tensor;

#[derive(Debug)]
pub struct Mlp {
    gate_up: Linear, // [2I, D]
    down: Linear,    // [D, I]
}

pub struct MlpSaved {
    x: Tensor,
    gate_up: Tensor,
}

impl Mlp {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str, width: i64) -> Self {
        let gate_up = table.matrix(format!("{prefix}.gate_up_proj.weight"), &[2 * width, config.hidden_size], config);
        let down = table.matrix(format!("{prefix}.down_proj.weight"), &[config.hidden_size, width], config);
        Mlp { gate_up: Linear { weight: gate_up }, down: Linear { weight: down } }
    }
}

impl Layer for Mlp {
    type In = Tensor; // [T, D]
    type Out = Tensor; // [T, D]
    type DOut = Tensor;
    type DIn = Tensor;
    type Saved = MlpSaved;
    type WeightWork = [LinearWork; 2];

    fn forward(&self, w: &Weights, x: Tensor) -> (Tensor, MlpSaved) {
        let (gate_up, x) = self.gate_up.forward(w, x); // [T, 2I]
        let (y, _) = self.down.forward(w, swiglu::forward(&gate_up, None));
        (y, MlpSaved { x, gate_up }) // the activation is made again in backward: half the bytes
    }
    fn backward_input(&self, w: &Weights, dy: Tensor, saved: MlpSaved) -> (Tensor, [LinearWork; 2]) {
        let activation = swiglu::forward(&saved.gate_up, None); // [T, I]
        let (dactivation, down) = self.down.backward_input(w, dy, activation);
        let (dgate_up, _) = swiglu::backward(&dactivation, &saved.gate_up, None);
        let (dx, up) = self.gate_up.backward_input(w, dgate_up, saved.x);
        (dx, [up, down])
    }
    fn backward_weight(&self, [up, down]: [LinearWork; 2], grads: &mut Grads) {
        self.gate_up.backward_weight(up, grads);
        self.down.backward_weight(down, grads);
    }
}
