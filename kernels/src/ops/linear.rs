//! y = x · Wᵀ and its two gradients: the three GEMMs (Fprop, Dgrad, Wgrad; report §3.3) of every linear.
//!
//! Legend: T tokens, I in, O out.
use tch::{Kind, Tensor};

/// x [T, I], weight [O, I] → [T, O].
pub fn forward(x: &Tensor, weight: &Tensor) -> Tensor {
    x.matmul(&weight.tr())
}

/// dy [T, O], weight [O, I] → dx [T, I].
pub fn backward_input(dy: &Tensor, weight: &Tensor) -> Tensor {
    dy.matmul(weight)
}

/// dyᵀ · x [O, I]: the first contribution to a gradient. BF16 products on a GPU come in FP32, as they were summed.
pub fn weight_gradient(dy: &Tensor, x: &Tensor) -> Tensor {
    if in_fp32(dy) { dy.tr().mm_dtype(x, Kind::Float) } else { dy.tr().matmul(x) }
}

/// gradient [O, I] += dyᵀ · x, in the gradient's own (wider) kind.
pub fn backward_weight(dy: &Tensor, x: &Tensor, gradient: &mut Tensor) {
    if gradient.kind() == x.kind() {
        let _ = gradient.addmm_(&dy.tr(), x);
    } else if in_fp32(dy) && gradient.kind() == Kind::Float {
        let _ = gradient.addmm_dtype_out(gradient, &dy.tr(), x, Kind::Float);
    } else {
        let _ = gradient.g_add_(&weight_gradient(dy, x).to_kind(gradient.kind()));
    }
}

fn in_fp32(dy: &Tensor) -> bool {
    dy.device().is_cuda() && dy.kind() == Kind::BFloat16
}
