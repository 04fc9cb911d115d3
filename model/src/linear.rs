//! y = x · Wᵀ.   Legend: T tokens, I in, O out.
use crate::{Grads, Layer, ParamId, Weights};
use kernels::ops::linear;
use tch::Tensor;

#[derive(Debug)]
pub struct Linear {
    pub weight: ParamId,
}

pub struct LinearWork {
    dy: Tensor,
    x: Tensor,
}

impl Layer for Linear {
    type In = Tensor; // [T, I]
    type Out = Tensor; // [T, O]
    type DOut = Tensor;
    type DIn = Tensor;
    type Saved = Tensor; // x
    type WeightWork = LinearWork;

    fn forward(&self, w: &Weights, x: Tensor) -> (Tensor, Tensor) {
        (linear::forward(&x, w.get(self.weight)), x)
    }
    fn backward_input(&self, w: &Weights, dy: Tensor, x: Tensor) -> (Tensor, LinearWork) {
        (linear::backward_input(&dy, w.get(self.weight)), LinearWork { dy, x })
    }
    fn backward_weight(&self, work: LinearWork, grads: &mut Grads) {
        grads.add_product(self.weight, &work.dy, &work.x);
    }
}
