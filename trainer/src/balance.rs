//! Auxiliary-loss-free load balancing (report §2.1.2): after each step the bias of an overloaded expert falls by
//! γ, that of an underloaded one rises by γ. The load is the whole batch's, in integers.
use model::{ParamId, Weights};
use tch::{Kind, Tensor};

/// `counts` [MoE layers, E] i64, wherever, summed over micro-batches and ranks, in the order of `biases`.
pub fn update(weights: &mut Weights, biases: &[Option<ParamId>], counts: &Tensor, speed: f64) {
    if speed == 0.0 {
        return;
    }
    // Few bytes, for which the host is not to wait until the GPU has done its update.
    let counts = counts.to_device_(weights.device(), Kind::Int64, true, false);
    for (layer, bias) in biases.iter().enumerate() {
        let Some(bias) = *bias else { continue };
        let counts = counts.select(0, layer as i64);
        // sign(mean − count) without leaving the integers: sign(Σ − E·count).
        let direction = (counts.sum(Kind::Int64) - &counts * counts.size()[0]).sign();
        let moved = weights.get(bias) + direction.to_kind(weights.get(bias).kind()) * speed;
        weights.set(bias, &moved);
    }
}

/// Largest and smallest expert load as a share of the mean, over all layers.
pub fn extremes(counts: &Tensor) -> (f64, f64) {
    if counts.numel() == 0 {
        return (0.0, f64::INFINITY); // no router here: another rank's will say
    }
    let counts = counts.to_kind(Kind::Double);
    let share = &counts / counts.mean_dim(&[1i64][..], true, None);
    (share.max().double_value(&[]), share.min().double_value(&[]))
}
