//! Output head with its loss: the logits live only inside the forward, which makes their gradient at once.
//!
//! Legend: T targets, D hidden size, V vocabulary.
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
    dlogits: Tensor,
}

impl Layer for LmHead {
    type In = HeadIn;
    type Out = Tensor; // Σ of the losses, one number
    type DOut = ();    // it is the loss: its gradient is `scale`, already in dlogits
    type DIn = Tensor;
    type Saved = HeadSaved;
    type WeightWork = HeadSaved;

    fn forward(&self, w: &Weights, x: HeadIn) -> (Tensor, HeadSaved) {
        let logits = linear::forward(&x.hidden, w.get(self.weight)); // [T, V]
        let (loss, dlogits) = cross_entropy::forward(logits, &x.targets, x.scale);
        (loss, HeadSaved { hidden: x.hidden, dlogits })
    }
    fn backward_input(&self, w: &Weights, _: (), saved: HeadSaved) -> (Tensor, HeadSaved) {
        let dlogits = saved.dlogits.to_kind(saved.hidden.kind());
        (linear::backward_input(&dlogits, w.get(self.weight)), HeadSaved { hidden: saved.hidden, dlogits })
    }
    fn backward_weight(&self, work: HeadSaved, grads: &mut Grads) {
        linear::backward_weight(&work.dlogits, &work.hidden, grads.at(self.weight));
    }
}
