//! Output head with its loss. The logits are turned into their gradient at once and in their own memory, so that neither
//! exists beside the other.
//!
//! Legend: T targets, D hidden size, V vocabulary.
use crate::saved::{LOGITS, See};
use crate::{Grads, Layer, ParamId, Weights};
use kernels::ops::{cross_entropy, linear};
use tch::Tensor;

#[derive(Debug)]
pub struct LmHead {
    pub weight: ParamId, // [V, D]
}

pub struct HeadIn {
    pub hidden: Tensor,  // [T, D]
    pub targets: Tensor, // [T] i64
    /// d(total loss) / d(Σ of this head's losses).
    pub scale: f64,
}

pub struct HeadSaved {
    hidden: Tensor,
    /// Without the scale.
    dlogits: Tensor, // [T, V]
    scale: f64,
}

impl HeadSaved {
    pub(crate) fn each(&self, see: See) {
        see("head's input", &self.hidden);
        see(LOGITS, &self.dlogits);
    }
}

impl Layer for LmHead {
    type In = HeadIn;
    type Out = Tensor; // Σ of the losses, one number
    type DOut = ();    // it is the loss: its gradient is `scale`, already in dlogits
    type DIn = Tensor;
    type Saved = HeadSaved;
    type WeightWork = HeadSaved;

    fn forward(&self, w: &Weights, x: HeadIn) -> (Tensor, HeadSaved) {
        let weight = w.get(self.weight);
        w.gemms.count(x.hidden.kind());
        let mut dlogits = linear::forward(&x.hidden, weight); // [T, V], the logits so far
        let loss = cross_entropy::forward(dlogits.shallow_clone(), &x.targets, &mut dlogits);
        (loss, HeadSaved { hidden: x.hidden, dlogits, scale: x.scale })
    }
    fn backward_input(&self, w: &Weights, _: (), saved: HeadSaved) -> (Tensor, HeadSaved) {
        w.gemms.count(saved.dlogits.kind());
        (linear::backward_input(&saved.dlogits, w.get(self.weight)) * saved.scale, saved)
    }
    fn backward_weight(&self, work: HeadSaved, grads: &mut Grads) {
        grads.add_product(self.weight, &work.dlogits, &(work.hidden * work.scale));
    }
}
