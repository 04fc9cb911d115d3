//! The sentinel's part in the layers (FP8 runs): which linears compute in BF16 for now, and whose three products are also
//! made in BF16 in this step, to be compared. A shadow changes nothing: the step goes on with the FP8 product. Who is
//! whose turn, and what follows, is the trainer's.
use crate::ParamId;
use std::cell::RefCell;
use tch::{Device, Kind, Tensor};

/// The three GEMMs of a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    Fprop,
    Dgrad,
    Wgrad,
}

#[derive(Debug, Default)]
pub struct Sentinel {
    in_bf16: Vec<ParamId>,
    shadowed: Option<ParamId>,
    /// Of each product the largest ‖FP8 − BF16‖ / ‖BF16‖ of this step; None: not made yet.
    errors: RefCell<[Option<Tensor>; 3]>,
}

impl Sentinel {
    pub fn new(in_bf16: Vec<ParamId>, shadowed: Option<ParamId>) -> Self {
        Sentinel { in_bf16, shadowed, errors: RefCell::default() }
    }

    pub fn in_bf16(&self, weight: ParamId) -> bool {
        self.in_bf16.contains(&weight)
    }

    pub fn shadows(&self, weight: ParamId) -> bool {
        self.shadowed == Some(weight)
    }

    /// Needs its operands as they were before they were quantised.
    pub fn watches(&self, weight: ParamId) -> bool {
        self.in_bf16(weight) || self.shadows(weight)
    }

    pub fn record(&self, product: Product, fp8: &Tensor, bf16: &Tensor) {
        let norm = |x: Tensor| x.norm().to_kind(Kind::Double);
        let bf16 = bf16.to_kind(Kind::Float);
        let size = norm(bf16.shallow_clone());
        let error = norm(fp8.to_kind(Kind::Float) - bf16) / size.clamp_min(f64::MIN_POSITIVE);
        let error = error.nan_to_num(f64::INFINITY, f64::INFINITY, f64::INFINITY);
        // Where BF16 comes to no number either, FP8 is not to blame.
        let error = error.masked_fill(&size.isfinite().logical_not(), 0.0);
        let worst = &mut self.errors.borrow_mut()[product as usize];
        *worst = Some(worst.as_ref().map_or_else(|| error.shallow_clone(), |worst| worst.maximum(&error)));
    }

    /// Fprop's, Dgrad's and Wgrad's, [3] f64; 0 where the shadowed linear is none of this rank's.
    pub fn errors(&self, device: Device) -> Tensor {
        let none = || Tensor::zeros([], (Kind::Double, device));
        let all = self.errors.borrow();
        Tensor::stack(&all.iter().map(|error| error.as_ref().map_or_else(none, Tensor::shallow_clone)).collect::<Vec<_>>(), 0)
    }
}
