//! The reference, one k after another.
use crate::ops::quantise::gather;
use tch::{Kind, Tensor};

pub fn forward(rows: &Tensor, index: &Tensor, add: &[&Tensor]) -> Tensor {
    let (t, k) = index.size2().expect("index is [T, K]");
    let mut sum = Tensor::zeros([t, rows.size()[1]], (Kind::Float, rows.device()));
    add.iter().for_each(|add| sum += *add);
    for k in 0..k {
        sum += gather(&rows.to_kind(Kind::Float), &index.select(1, k));
    }
    sum.to_kind(rows.kind())
}
