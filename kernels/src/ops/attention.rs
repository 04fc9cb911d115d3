//! Causal softmax attention whose query/key width differs from its value width (MLA: 192 and 128).
//!
//! Three ways: the reference, which keeps the probabilities, for any device and kind; cuDNN on a GPU in BF16, whose
//! backward adds as threads come; and beside cuDNN's forward a backward of our own in products over a few heads, or a
//! part of one, at a time, slower, which gives the same bits every time. Documents that must not see each other are so many attentions.
//!
//! Legend: B sequences, H heads, S positions, Dk / Dv head widths, N = B · H.
use super::wide;
use crate::shim::{CudnnAttention, cudnn_attention};
use tch::{Kind, Tensor};

/// What backward needs beside q, k, v.
pub enum Saved {
    Probabilities(Tensor), // [B, H, S, S]
    Cudnn { made: CudnnAttention, repeatable: bool },
    /// Of each document, in order.
    Documents(Vec<(Place, Saved)>),
}

impl Saved {
    /// The output [B, H, S, Dv], where backward needs it.
    pub fn out(&self) -> Option<Tensor> {
        match self {
            Saved::Probabilities(_) => None,
            Saved::Cudnn { made, .. } => Some(made.out.shallow_clone()),
            Saved::Documents(list) => {
                let outs = list.iter().map(|(place, saved)| Some((*place, saved.out()?.narrow(2, 0, place.length))));
                Some(joined(outs.collect::<Option<Vec<_>>>()?))
            }
        }
    }
}

/// Where a document lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    sequence: i64,
    start: i64,
    length: i64,
}

/// Most bytes of FP32 scores at a time in the repeatable backward, which has four such tensors.
const PART_BYTES: i64 = 512 << 20;

/// q, k [B, H, S, Dk], v [B, H, S, Dv] → out [B, H, S, Dv]. `repeatable`: the backward gives the same bits every time.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, repeatable: bool) -> (Tensor, Saved) {
    if !for_cudnn(q, v) {
        let (out, probabilities) = reference(q, k, v, scale);
        return (out, Saved::Probabilities(probabilities));
    }
    let made = cudnn_attention(q, k, v, scale).expect("cuDNN takes what for_cudnn lets through");
    (made.out.shallow_clone(), Saved::Cudnn { made, repeatable })
}

/// dout [B, H, S, Dv] → (dq, dk, dv) shaped as q, k, v.
pub fn backward(dout: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, saved: &Saved, scale: f64) -> (Tensor, Tensor, Tensor) {
    match saved {
        Saved::Probabilities(probabilities) => reference_backward(dout, q, k, v, probabilities, scale),
        Saved::Cudnn { made, repeatable: false } => cudnn_backward(dout, [q, k, v], made, scale),
        Saved::Cudnn { made, repeatable: true } => in_parts(dout, [q, k, v], made, scale, PART_BYTES),
        Saved::Documents(list) => {
            let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
            for (place, saved) in list {
                let (q, k, v, dout) = (cut(q, *place), cut(k, *place), cut(v, *place), cut(dout, *place));
                let made = backward(&dout, &q, &k, &v, saved, scale);
                for (all, part) in [(&mut dq, made.0), (&mut dk, made.1), (&mut dv, made.2)] {
                    all.push((*place, part.narrow(2, 0, place.length)));
                }
            }
            (joined(dq), joined(dk), joined(dv))
        }
    }
}

/// As `forward`, and a position sees only those of its own document. `documents`: the lengths of each sequence's, in order; what
/// reaches past S is cut off.
pub fn forward_within(documents: &[Vec<i64>], [q, k, v]: [&Tensor; 3], scale: f64, repeatable: bool) -> (Tensor, Saved) {
    let (sequences, positions) = (q.size()[0], q.size()[2]);
    assert_eq!(documents.len() as i64, sequences, "every sequence has its documents");
    let (mut outs, mut saved) = (Vec::new(), Vec::new());
    for (sequence, lengths) in documents.iter().enumerate() {
        let mut start = 0;
        for &length in lengths {
            let place = Place { sequence: sequence as i64, start, length: length.min(positions - start) };
            start += place.length;
            if place.length > 0 {
                let (out, kept) = forward(&cut(q, place), &cut(k, place), &cut(v, place), scale, repeatable);
                outs.push((place, out.narrow(2, 0, place.length)));
                saved.push((place, kept));
            }
        }
        assert_eq!(start, positions, "the documents of sequence {sequence} are shorter than it");
    }
    (joined(outs), Saved::Documents(saved))
}

/// cuDNN makes a plan of its own for every length, so documents are lengthened to multiples of this. Attention is causal: no
/// position of a document sees the zeros behind it, and without a gradient they give none.
const STEP: i64 = 64;

fn cut(x: &Tensor, Place { sequence, start, length }: Place) -> Tensor {
    let piece = x.narrow(0, sequence, 1).narrow(2, start, length);
    if x.device().is_cuda() { piece.constant_pad_nd([0, 0, 0, (STEP - length % STEP) % STEP]) } else { piece }
}

/// Documents [1, H, length, D], in order → [B, H, S, D].
fn joined(pieces: Vec<(Place, Tensor)>) -> Tensor {
    let of = |sequence: i64| {
        let parts: Vec<&Tensor> = pieces.iter().filter(|(place, _)| place.sequence == sequence).map(|(_, part)| part).collect();
        Tensor::cat(&parts, 2)
    };
    let sequences = pieces.last().expect("there are positions").0.sequence + 1;
    Tensor::cat(&(0..sequences).map(of).collect::<Vec<_>>(), 0)
}

/// BF16 on a GPU, widths that cuDNN has kernels for, and more than a handful of positions.
fn for_cudnn(q: &Tensor, v: &Tensor) -> bool {
    q.device().is_cuda() && fused(q.kind(), (q.size()[3], v.size()[3]), q.size()[2])
}

/// Whether cuDNN takes it on a GPU: queries and values of these widths, over so many positions. Else probabilities are kept.
pub fn fused(kind: Kind, (width, value): (i64, i64), positions: i64) -> bool {
    let widths = width % 8 == 0 && value % 8 == 0 && value <= 128 && (width <= 128 || (width, value) == (192, 128));
    kind == Kind::BFloat16 && widths && positions >= 64
}

fn reference(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> (Tensor, Tensor) {
    let positions = q.size()[2];
    // −inf above the diagonal; made each time: S² of one head is small beside B·H of them.
    let mask = above_diagonal(positions, q);
    let (batch, heads) = (q.size()[0], q.size()[1]);
    let flat = |t: &Tensor| t.reshape([batch * heads, positions, -1]);
    let scores = mask.unsqueeze(0).baddbmm(&flat(q), &flat(k).transpose(1, 2), 1.0, scale);
    let probabilities = scores.softmax(-1, wide(q.kind())).to_kind(q.kind());
    let out = probabilities.bmm(&flat(v));
    (out.view([batch, heads, positions, -1]), probabilities.view([batch, heads, positions, positions]))
}

fn above_diagonal(positions: i64, like: &Tensor) -> Tensor {
    Tensor::full([positions, positions], f64::NEG_INFINITY, (like.kind(), like.device())).triu(1)
}

fn reference_backward(dout: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, probabilities: &Tensor, scale: f64) -> (Tensor, Tensor, Tensor) {
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

fn cudnn_backward(dout: &Tensor, [q, k, v]: [&Tensor; 3], made: &CudnnAttention, scale: f64) -> (Tensor, Tensor, Tensor) {
    let CudnnAttention { out, log_sum_exp, random_state: [seed, offset] } = made;
    let (none, positions) = (Tensor::new(), q.size()[2]);
    Tensor::internal_scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        log_sum_exp,
        seed,
        offset,
        &none,
        &none,
        &none,
        positions,
        positions,
        0.0,
        true,
        scale,
    )
}

/// The probabilities are made again from the log-sum-exp, dS = P ⊙ (dP − Σ dout·out), with scores of at most `bytes`, or of 64
/// queries, at a time: of a group of heads, or where one head has more, of some of its queries and the keys that they see.
fn in_parts(dout: &Tensor, [q, k, v]: [&Tensor; 3], made: &CudnnAttention, scale: f64, bytes: i64) -> (Tensor, Tensor, Tensor) {
    let (batch, heads, positions) = (q.size()[0], q.size()[1], q.size()[2]);
    let flat = |t: &Tensor| t.reshape([batch * heads, positions, -1]);
    let [q, k, v, dout, out] = [q, k, v, dout, &made.out].map(flat);
    let lse = made.log_sum_exp.reshape([batch * heads, positions, 1]);
    let delta = (dout.to_kind(Kind::Float) * out).sum_dim_intlist(&[2i64][..], true, None); // [N, S, 1]
    let (dq, dk, dv) = (q.empty_like(), k.empty_like(), v.empty_like());
    let each = (bytes / (4 * positions * positions)).clamp(1, batch * heads);
    let rows = (bytes / (4 * positions) / 64 * 64).clamp(64.min(positions), positions);
    for start in (0..batch * heads).step_by(each as usize) {
        let group = |t: &Tensor| t.narrow(0, start, each.min(batch * heads - start));
        let [q, k, v, dout, lse, delta, dq, dk, dv] = [&q, &k, &v, &dout, &lse, &delta, &dq, &dk, &dv].map(group);
        let sums = |like: &Tensor| Tensor::zeros(like.size(), (Kind::Float, like.device()));
        let (dk_sum, dv_sum) = (sums(&dk), sums(&dv));
        for first in (0..positions).step_by(rows as usize) {
            let end = (first + rows).min(positions);
            let [q, dout, lse, delta, dq] = [&q, &dout, &lse, &delta, &dq].map(|t| t.narrow(1, first, end - first));
            let [k, v, mut dk_sum, mut dv_sum] = [&k, &v, &dk_sum, &dv_sum].map(|t| t.narrow(1, 0, end));
            let mask = Tensor::full([end - first, end], f64::NEG_INFINITY, (Kind::Float, q.device())).triu(1 + first);
            let p = (product(&q, &k.transpose(1, 2)) * scale + mask - lse).exp();
            let dscores = ((product(&dout, &v.transpose(1, 2)) - delta) * &p * scale).to_kind(q.kind());
            let _ = dv_sum.g_add_(&product(&p.to_kind(q.kind()).transpose(1, 2), &dout));
            let _ = dk_sum.g_add_(&product(&dscores.transpose(1, 2), &q));
            dq.shallow_clone().copy_(&dscores.bmm(&k));
        }
        dk.shallow_clone().copy_(&dk_sum);
        dv.shallow_clone().copy_(&dv_sum);
    }
    let unflat = |t: Tensor| t.view([batch, heads, positions, -1]);
    (unflat(dq), unflat(dk), unflat(dv))
}

/// In FP32.
fn product(a: &Tensor, b: &Tensor) -> Tensor {
    if a.device().is_cuda() { a.bmm_dtype(b, Kind::Float) } else { a.to_kind(Kind::Float).bmm(&b.to_kind(Kind::Float)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_repeatable_backward_make_the_whole() {
        tch::manual_seed(11);
        let (batch, heads, positions, scale) = (2, 3, 200, 0.25);
        let random = |width: i64| Tensor::randn([batch, heads, positions, width], (Kind::Double, tch::Device::Cpu)).to_kind(Kind::BFloat16);
        let (q, k, v, dout) = (random(24), random(24), random(16), random(16));
        let wide = [&q, &k, &v].map(|t| t.to_kind(Kind::Double));
        let (out, probabilities) = reference(&wide[0], &wide[1], &wide[2], scale);
        let (dq, dk, dv) = reference_backward(&dout.to_kind(Kind::Double), &wide[0], &wide[1], &wide[2], &probabilities, scale);
        let scores = wide[0].matmul(&wide[1].transpose(2, 3)) * scale + above_diagonal(positions, &wide[0]);
        let log_sum_exp = scores.logsumexp(&[-1i64][..], false).to_kind(Kind::Float);
        let made = CudnnAttention { out: out.to_kind(Kind::BFloat16), log_sum_exp, random_state: [Tensor::new(), Tensor::new()] };
        // All heads at once; two, then two; one, in 128 and 72 rows; one, in 64, 64, 64 and 8.
        for bytes in [1 << 30, 2 * 4 * positions * positions, 4 * positions * 150, 1] {
            let made = in_parts(&dout, [&q, &k, &v], &made, scale, bytes);
            for (name, made, expected) in [("dq", made.0, &dq), ("dk", made.1, &dk), ("dv", made.2, &dv)] {
                let off = f64::try_from((made.to_kind(Kind::Double) - expected).norm() / expected.norm()).expect("a number");
                assert!(off < 5e-3, "{name} in parts of {bytes} bytes is off by {off}");
            }
        }
    }
}
