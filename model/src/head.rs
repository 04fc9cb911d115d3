//! Output head with its loss. The logits are made a few rows at a time and turned into their gradient at once, so
//! the full matrix of logits never exists beside its gradient.
//!
//! Legend: T targets, D hidden size, V vocabulary.
use crate::{Grads, Layer, ParamId, Weights};
use kernels::ops::{cross_entropy, linear};
use tch::Tensor;

/// Rows of logits that exist at one time: a product this tall is still efficient.
const ROWS: i64 = 256;

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

impl Layer for LmHead {
    type In = HeadIn;
    type Out = Tensor; // Σ of the losses, one number
    type DOut = ();    // it is the loss: its gradient is `scale`, already in dlogits
    type DIn = Tensor;
    type Saved = HeadSaved;
    type WeightWork = HeadSaved;

    fn forward(&self, w: &Weights, x: HeadIn) -> (Tensor, HeadSaved) {
        let weight = w.get(self.weight);
        let (total, vocab) = (x.hidden.size()[0], weight.size()[0]);
        let dlogits = Tensor::empty([total, vocab], (x.hidden.kind(), x.hidden.device()));
        let mut loss = Tensor::zeros([], (w.precision.master(), x.hidden.device()));
        for start in (0..total).step_by(ROWS as usize) {
            let rows = ROWS.min(total - start);
            let logits = linear::forward(&x.hidden.narrow(0, start, rows), weight); // [rows, V]
            loss += cross_entropy::forward(logits, &x.targets.narrow(0, start, rows), &mut dlogits.narrow(0, start, rows));
        }
        (loss, HeadSaved { hidden: x.hidden, dlogits, scale: x.scale })
    }
    fn backward_input(&self, w: &Weights, _: (), saved: HeadSaved) -> (Tensor, HeadSaved) {
        (linear::backward_input(&saved.dlogits, w.get(self.weight)) * saved.scale, saved)
    }
    fn backward_weight(&self, work: HeadSaved, grads: &mut Grads) {
        grads.add_product(self.weight, &work.dlogits, &(work.hidden * work.scale));
    }
}
