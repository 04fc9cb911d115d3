//! Rows of a table by index, and the table's gradient, in one order on every device.
//!
//! Legend: T tokens, V vocabulary, D width.
use tch::Tensor;

/// gradient [V, D] += the rows of dy [T, D] at `tokens` [T] i64.
pub fn backward(gradient: &mut Tensor, tokens: &Tensor, dy: &Tensor) {
    let dy = dy.to_kind(gradient.kind());
    if gradient.device().is_cuda() {
        // Sorts by token first, so each sum has one order; index_add_ would add as threads come.
        let _ = gradient.index_put_(&[Some(tokens)], &dy, true);
    } else {
        let _ = gradient.index_add_(0, tokens, &dy);
    }
}
