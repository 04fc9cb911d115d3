//! Softmax cross-entropy: the loss and its gradient in one pass over the logits, so that neither the logits nor
//! a second copy of them live until backward.
//!
//! Legend: T tokens, V vocabulary.
use super::wide;
use tch::Tensor;

/// logits [T, V], targets [T] i64 → (Σ over tokens of the loss, in at least FP32; d(scale · Σ loss)/dlogits [T, V]
/// in the logits' kind). `scale` is 1 / (targets of the global batch), times the loss's weight.
pub fn forward(logits: Tensor, targets: &Tensor, scale: f64) -> (Tensor, Tensor) {
    let kind = logits.kind();
    let log_p = logits.log_softmax(-1, wide(kind));
    drop(logits);
    let targets = targets.unsqueeze(1);
    let loss = -log_p.gather(1, &targets, false).sum(wide(kind));
    let mut dlogits = log_p; // ours alone: softmax − onehot is made in its place
    let _ = dlogits.exp_();
    let minus_one = Tensor::full_like(&targets, -1.0).to_kind(dlogits.kind());
    let _ = dlogits.scatter_add_(1, &targets, &minus_one);
    let _ = dlogits.g_mul_scalar_(scale);
    (loss, dlogits.to_kind(kind))
}
