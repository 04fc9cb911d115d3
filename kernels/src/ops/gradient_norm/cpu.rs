//! The reference.
use tch::{Kind, Tensor};

pub fn sum_of_squares(gradients: &[&Tensor]) -> Tensor {
    let sums = gradients.iter().map(|gradient| gradient.to_kind(Kind::Double).square().sum(Kind::Double));
    Tensor::stack(&sums.collect::<Vec<_>>(), 0).sum(Kind::Double)
}
