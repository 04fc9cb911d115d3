//! RMSNorm in torch ops. Statistics in at least FP32.
use super::{Make, Normed};
use crate::ops::quantise::activation;
use crate::ops::wide;
use tch::{Kind, Tensor};

pub(super) fn rstd(x: &Tensor, eps: f64) -> Tensor {
    let x = x.to_kind(wide(x.kind()));
    let mean_square = x.norm_scalaropt_dim(2.0, &[-1i64][..], true).square() / x.size()[x.dim() - 1] as f64;
    (mean_square + eps).rsqrt()
}

pub(super) fn normed(x: &Tensor, rstd: &Tensor, weight: &Tensor) -> Tensor {
    let kind = x.kind();
    (x.to_kind(wide(kind)) * rstd).to_kind(kind) * weight
}

pub(super) fn backward(
    dy: &Tensor,
    x: &Tensor,
    rstd: &Tensor,
    weight: &Tensor,
    add: Option<&Tensor>,
) -> (Tensor, Tensor) {
    let kind = x.kind();
    let normed = x.to_kind(wide(kind)) * rstd;
    let dy = dy.to_kind(wide(kind));
    let dy_normed = &dy * &normed;
    let weight = weight.to_kind(wide(kind));
    // mean over D of (dy·w)·x̂ as a matrix-vector product: one pass, no temporary.
    let projection = dy_normed.matmul(&weight.unsqueeze(1)) / x.size()[x.dim() - 1] as f64; // [T, 1]
    let dx = (dy * weight - normed * projection) * rstd;
    let dx = match add {
        Some(add) => dx + add,
        None => dx,
    };
    (dx.to_kind(kind), dy_normed.sum_dim_intlist(&[0i64][..], false, None))
}

pub(super) fn add(x: &Tensor, y: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let sum = x + y;
    let rstd = rstd(&sum, eps);
    (sum, rstd)
}

/// The reference of the fused pass.
pub(super) fn quantised(x: &Tensor, rstd: &Tensor, weight: &Tensor, make: Make) -> Normed {
    let y = (x.to_kind(Kind::Float) * rstd * weight.to_kind(Kind::Float)).to_kind(Kind::BFloat16);
    Normed { quantised: activation(&y, None, make.want, make.rule), y: make.bf16.then_some(y) }
}
