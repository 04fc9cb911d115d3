//! y = x · Wᵀ and its two gradients: the three GEMMs (Fprop, Dgrad, Wgrad; report §3.3) of every linear.
//!
//! Legend: T tokens, I in, O out.
use tch::Tensor;

/// x [T, I], weight [O, I] → [T, O].
pub fn forward(x: &Tensor, weight: &Tensor) -> Tensor {
    x.matmul(&weight.tr())
}

/// dy [T, O], weight [O, I] → dx [T, I].
pub fn backward_input(dy: &Tensor, weight: &Tensor) -> Tensor {
    dy.matmul(weight)
}

/// dyᵀ · x [O, I]: the first contribution to a gradient.
pub fn weight_gradient(dy: &Tensor, x: &Tensor) -> Tensor {
    dy.tr().matmul(x)
}

/// gradient [O, I] += dyᵀ · x, in the gradient's own (wider) kind.
pub fn backward_weight(dy: &Tensor, x: &Tensor, gradient: &mut Tensor) {
    if gradient.kind() == x.kind() {
        let _ = gradient.addmm_(&dy.tr(), x);
    } else {
        let _ = gradient.g_add_(&weight_gradient(dy, x).to_kind(gradient.kind()));
    }
}
