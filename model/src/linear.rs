//! y = x · Wᵀ.   Legend: T tokens, I in, O out.
use crate::operand::{self, Operand};
use crate::saved::{PUT_OFF, See};
use crate::{Grads, Layer, ParamId, Weights};
use tch::Tensor;

#[derive(Debug)]
pub struct Linear {
    pub weight: ParamId,
}

pub struct LinearWork {
    pub dy: Operand,
    pub x: Operand,
}

impl LinearWork {
    pub(crate) fn each(&self, see: See) {
        [&self.dy, &self.x].into_iter().for_each(|side| side.each(PUT_OFF, see));
    }
}

impl Layer for Linear {
    type In = Operand; // [T, I]
    type Out = Tensor; // [T, O]
    type DOut = Tensor;
    type DIn = Tensor;
    type Saved = Operand; // x
    type WeightWork = LinearWork;

    fn forward(&self, w: &Weights, x: Operand) -> (Tensor, Operand) {
        (x.forward(w, self.weight), x.for_weight())
    }
    fn backward_input(&self, w: &Weights, dy: Tensor, x: Operand) -> (Tensor, LinearWork) {
        let (dx, dy) = x.gradient(w, dy, self.weight).backward_input(w, self.weight);
        (dx, LinearWork { dy, x })
    }
    fn backward_weight(&self, work: LinearWork, grads: &mut Grads) {
        operand::backward_weight(grads, self.weight, &work.dy, &work.x);
    }
}
