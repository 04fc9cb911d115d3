//! What a layer is. Local maths, no communication; a shape mismatch is a bug and panics.
//!
//! Inputs and `Saved` are moved: memory is freed by ownership, using a saved value twice does not compile. No
//! default bodies: a silent no-op backward must not be writable. tch's `shallow_clone` aliases, so nothing may be
//! changed in place that a `Saved` can hold.
use crate::params::{Grads, Weights};

pub trait Layer {
    type In;
    type Out;
    /// The gradient of `Out` (the gate's is the routing weights' gradient).
    type DOut;
    /// The gradient of `In` (the embedding's is `()`).
    type DIn;
    /// All that backward may keep.
    type Saved;
    /// What the weight gradient still needs after the input gradient is out. A value: the schedule runs it at
    /// once or queues it.
    type WeightWork;
    fn forward(&self, w: &Weights, x: Self::In) -> (Self::Out, Self::Saved);
    fn backward_input(&self, w: &Weights, dy: Self::DOut, saved: Self::Saved) -> (Self::DIn, Self::WeightWork);
    /// grads[id] += …
    fn backward_weight(&self, work: Self::WeightWork, grads: &mut Grads);
}
