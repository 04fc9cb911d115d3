//! The FP8 GEMMs of the experts: rows of all experts lie one after another, any number ≥ 0 each.
//!
//! The true counts are read on the device: no host wait, no padding copies, no tile that only holds padding.
use crate::fp8::{Blocks, Columns, Rows};
use crate::ops::gemm_fp8::{Groups, Options, Write, forward_into, out_like, wgrad_into};
use std::ops::Range;
use tch::Tensor;

/// a [R, K], b [E, N, K], counts [E] i32 → [R, N]. Rows past the sum of the counts are not written.
pub fn forward(a: &Rows, b: &Blocks, counts: &Tensor, options: Options) -> Tensor {
    let out = out_like(a, b.values.size3().expect("b is [E, N, K]").1, options);
    forward_into(a, b, Some(counts), &out, options);
    out
}

/// `gradient` [E, M, N] FP32 = or += dyᵀ · x of each expert's `counts` rows, both quantised by columns. Of these `experts`: the
/// others' gradients are not touched.
pub fn wgrad(dy: &Columns, x: &Columns, (counts, experts): (&Tensor, Range<i64>), gradient: &mut Tensor, write: Write, options: Options) {
    let rows = dy.values.size()[1];
    wgrad_into(dy, x, (Groups { counts: Some(counts), rows }, experts), gradient, write, options);
}
