//! RMSNorm.   Legend: T tokens, D width.
use crate::operand::Operand;
use crate::saved::See;
use crate::{Grads, Layer, ParamId, Weights};
use kernels::Precision;
use kernels::fp8::ScaleRule;
use kernels::ops::quantise::Want;
use kernels::ops::rms_norm::{self, Make};
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

    /// What was normed.
    pub fn x(&self) -> &Tensor {
        &self.x
    }
}

impl RmsNorm {
    /// As `operand`, of what has no statistics yet.
    pub fn begin(&self, w: &Weights, x: Tensor, want: Want, readers: &[ParamId]) -> (NormSaved, Operand) {
        if w.precision != Precision::Fp8 {
            let (y, saved) = self.forward(w, x);
            return (saved, Operand::Own(y));
        }
        let (made, rstd) = rms_norm::forward_quantised(&x, w.get(self.weight), self.eps, self.make(w, want, readers));
        (NormSaved { x, rstd }, Operand::Fp8 { quantised: made.quantised, own: made.y })
    }

    /// Of the residual sum x + y, from the pass that makes it.
    pub fn statistics_of_sum(&self, x: &Tensor, y: &Tensor) -> NormSaved {
        let (x, rstd) = rms_norm::add(x, y, self.eps);
        NormSaved { x, rstd }
    }

    /// The normed rows as `readers` read them: in FP8 runs quantised in the pass that makes them.
    pub fn operand(&self, w: &Weights, saved: &NormSaved, want: Want, readers: &[ParamId]) -> Operand {
        if w.precision != Precision::Fp8 {
            return Operand::Own(self.normed(w, saved));
        }
        let made = rms_norm::quantised(&saved.x, &saved.rstd, w.get(self.weight), self.make(w, want, readers));
        Operand::Fp8 { quantised: made.quantised, own: made.y }
    }

    fn make(&self, w: &Weights, want: Want, readers: &[ParamId]) -> Make {
        Make { want, bf16: readers.iter().any(|&reader| w.sentinel.watches(reader)), rule: ScaleRule::Amax }
    }

    /// As `backward_input`, with the gradient of the residual stream beside the norm added to dx in the same pass.
    pub fn backward_residual(&self, w: &Weights, dy: Tensor, saved: NormSaved, residual: &Tensor) -> (Tensor, Tensor) {
        rms_norm::backward_add(&dy, &saved.x, &saved.rstd, w.get(self.weight), Some(residual))
    }

    pub fn normed(&self, w: &Weights, saved: &NormSaved) -> Tensor {
        rms_norm::normed(&saved.x, &saved.rstd, w.get(self.weight))
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
