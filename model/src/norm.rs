//! RMSNorm.   Legend: T tokens, D width.
use crate::saved::See;
use crate::{Grads, Layer, ParamId, Weights};
use kernels::ops::rms_norm;
use tch::Tensor;

#[derive(Debug)]
pub struct RmsNorm {
    pub weight: ParamId,
    pub eps: f64,
}

pub struct NormSaved {
    x: Tensor,
    rstd: Tensor,
}

impl NormSaved {
    pub(crate) fn each(&self, part: &'static str, see: See) {
        see(part, &self.x);
        see(part, &self.rstd);
    }
}

impl RmsNorm {
    /// What forward made, bit for bit.
    pub fn again(&self, w: &Weights, saved: &NormSaved) -> Tensor {
        rms_norm::forward(&saved.x, w.get(self.weight), self.eps).0
    }
}

impl Layer for RmsNorm {
    type In = Tensor; // [T, D]
    type Out = Tensor; // [T, D]
    type DOut = Tensor;
    type DIn = Tensor;
    type Saved = NormSaved;
    /// The weight's gradient itself, [D]: it falls out of the input gradient's pass.
    type WeightWork = Tensor;

    fn forward(&self, w: &Weights, x: Tensor) -> (Tensor, NormSaved) {
        let (y, rstd) = rms_norm::forward(&x, w.get(self.weight), self.eps);
        (y, NormSaved { x, rstd })
    }
    fn backward_input(&self, w: &Weights, dy: Tensor, saved: NormSaved) -> (Tensor, Tensor) {
        rms_norm::backward(&dy, &saved.x, &saved.rstd, w.get(self.weight))
    }
    fn backward_weight(&self, dweight: Tensor, grads: &mut Grads) {
        grads.add(self.weight, dweight);
    }
}
