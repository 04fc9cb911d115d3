//! Causal softmax attention whose query/key width differs from its value width (MLA: 192 and 128).
//! This is the reference for every device; it keeps the probabilities.
//!
//! Legend: B sequences, H heads, S positions, Dk / Dv head widths.
use super::wide;
use tch::Tensor;

/// q, k [B, H, S, Dk], v [B, H, S, Dv] → out [B, H, S, Dv] and the probabilities [B, H, S, S].
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> (Tensor, Tensor) {
    let positions = q.size()[2];
    // −inf above the diagonal; made each time: S² of one head is small beside B·H of them.
    let mask = Tensor::full([positions, positions], f64::NEG_INFINITY, (q.kind(), q.device())).triu(1);
    let (batch, heads) = (q.size()[0], q.size()[1]);
    let flat = |t: &Tensor| t.reshape([batch * heads, positions, -1]);
    let scores = mask.unsqueeze(0).baddbmm(&flat(q), &flat(k).transpose(1, 2), 1.0, scale);
    let probabilities = scores.softmax(-1, wide(q.kind())).to_kind(q.kind());
    let out = probabilities.bmm(&flat(v));
    (out.view([batch, heads, positions, -1]), probabilities.view([batch, heads, positions, positions]))
}

/// dout [B, H, S, Dv] → (dq, dk, dv) shaped as q, k, v.
pub fn backward(dout: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, probabilities: &Tensor, scale: f64) -> (Tensor, Tensor, Tensor) {
    let (batch, heads, positions) = (q.size()[0], q.size()[1], q.size()[2]);
    let flat = |t: &Tensor| t.reshape([batch * heads, positions, -1]);
    let unflat = |t: Tensor| t.view([batch, heads, positions, -1]);
    let (dout, p) = (flat(dout), flat(probabilities));
    let dv = p.transpose(1, 2).bmm(&dout);
    let dp = dout.bmm(&flat(v).transpose(1, 2));
    let dscores = Tensor::internal_softmax_backward_data(&dp, &p, -1, q.kind()) * scale;
    let dq = dscores.bmm(&flat(k));
    let dk = dscores.transpose(1, 2).bmm(&flat(q));
    (unflat(dq), unflat(dk), unflat(dv))
}
