//! The three GEMMs of a linear whose weight and output are wider than its input: the router's, which is never below FP32
//! (report §3.3). On a GPU with BF16 inputs they run on the matrix units all the same: a number of FP32 is the sum of three
//! of BF16, whose products with a BF16 number FP32 holds exactly. The matrix units' sums round towards zero: 8e-6 of V3's
//! logits, where cuBLAS in FP32 has 8e-7, and takes four times as long and a copy of the input (scripts/bench.sh gpu router).
//!
//! Legend: T tokens, I in, O out.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use crate::ops::linear;
use tch::{Kind, Tensor};

const TEXT: &str = include_str!("thirds.cu");

fn source() -> Source {
    Source { name: "thirds", text: TEXT.to_string(), defines: Vec::new() }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    vec![(source(), "thirds")]
}

/// Are these products made of BF16 ones?
fn in_parts(narrow: Kind, wide: &Tensor) -> bool {
    wide.device().is_cuda() && wide.kind() == Kind::Float && narrow == Kind::BFloat16 && wide.size().iter().all(|n| n % 8 == 0)
}

/// The first part, the first again, the second and the third of each element of x [R, C], or (`reversed`) from the third to
/// the first: any three in a row are a product's operand. [4, R, C], or (`beside`) [R, 4, C].
fn thirds(x: &Tensor, reversed: bool, beside: bool) -> Tensor {
    let ((r, c), x) = (x.size2().expect("a matrix"), aligned(x));
    let (shape, row, block) = if beside { ([r, 4, c], 4 * c, c) } else { ([4, r, c], c, r * c) };
    let parts = Tensor::empty(shape, (Kind::BFloat16, x.device()));
    let gpu = device::gpu(x.device());
    let kernel = gpu.kernel("thirds", "thirds", source).expect("our own kernels compile and load");
    let fours = r * c / 4;
    let launch = Launch::new(gpu, &kernel).tensor(&x, Kind::Float).tensor(&parts, Kind::BFloat16);
    let launch = launch.int(fours).int(c).int(row).int(block).int(reversed.into());
    launch.run(Shape { grid: [(fours as usize).div_ceil(256), 1], block: 256, shared_bytes: 0 });
    parts
}

/// x [T, I], weight [O, I] → [T, O] of the weight's kind.
pub fn forward(x: &Tensor, weight: &Tensor) -> Tensor {
    if !in_parts(x.kind(), weight) {
        return linear::forward(&x.to_kind(weight.kind()), weight);
    }
    let (t, (o, i)) = (x.size()[0], weight.size2().expect("weight is [O, I]"));
    let parts = thirds(weight, true, false).narrow(0, 0, 3).view([3 * o, i]);
    x.mm_dtype(&parts.tr(), Kind::Float).view([t, 3, o]).sum_dim_intlist(&[1i64][..], false, None)
}

/// dy [T, O], weight [O, I] of one kind → dx [T, I] of `kind`. In BF16 it is the sum of the products of first parts, and of
/// first with second ones: what is left out is 2⁻¹⁶ of it.
pub fn backward_input(dy: &Tensor, weight: &Tensor, kind: Kind) -> Tensor {
    if !in_parts(kind, weight) {
        return linear::backward_input(dy, weight).to_kind(kind);
    }
    let (t, (o, i)) = (dy.size()[0], weight.size2().expect("weight is [O, I]"));
    // First, first and second by second, first and first.
    let parts = thirds(dy, false, true).view([t, 4 * o]).narrow(1, 0, 3 * o);
    parts.matmul(&thirds(weight, true, false).narrow(0, 1, 3).view([3 * o, i]))
}

/// gradient [O, I] += dyᵀ · x, or where it is `fresh` = dyᵀ · x; dy [T, O] of the gradient's kind, x [T, I].
pub fn backward_weight(dy: &Tensor, x: &Tensor, gradient: &mut Tensor, fresh: bool) {
    let product = if in_parts(x.kind(), dy) {
        let (t, o) = dy.size2().expect("dy is [T, O]");
        let parts = thirds(dy, true, true).view([t, 4 * o]).narrow(1, 0, 3 * o);
        parts.tr().mm_dtype(x, Kind::Float).view([3, o, -1]).sum_dim_intlist(&[0i64][..], false, None)
    } else {
        linear::weight_gradient(dy, &x.to_kind(dy.kind()))
    };
    if fresh { gradient.copy_(&product) } else { *gradient += product }
}
