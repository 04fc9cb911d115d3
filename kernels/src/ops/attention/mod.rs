//! Causal softmax attention whose query/key width differs from its value width (MLA: 192 and 128).
//!
//! Two ways: the reference, which keeps the probabilities, for any device and kind; and on a GPU in BF16 cuDNN's forward with a
//! backward of our own, since cuDNN's adds as threads come: both give the same bits every time. Documents that must not see each
//! other are so many attentions.
//!
//! Legend: B sequences, H heads, S positions, Dk / Dv head widths.
use super::wide;
use crate::launch::aligned;
use crate::shim::{CudnnAttention, cudnn_attention};
use tch::{Kind, Tensor};

mod backward;
mod wgmma;
pub use backward::sources;

/// What backward needs beside q, k, v.
pub enum Saved {
    Probabilities(Tensor), // [B, H, S, S]
    Fused(CudnnAttention),
    /// Of each document, in order.
    Documents(Vec<(Place, Saved)>),
}

impl Saved {
    /// The output [B, H, S, Dv], where backward needs it.
    pub fn out(&self) -> Option<Tensor> {
        match self {
            Saved::Probabilities(_) => None,
            Saved::Fused(made) => Some(made.out.shallow_clone()),
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

/// q, k [B, H, S, Dk], v [B, H, S, Dv] → out [B, H, S, Dv].
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> (Tensor, Saved) {
    if !for_cudnn(q, v) {
        let (out, probabilities) = reference(q, k, v, scale);
        return (out, Saved::Probabilities(probabilities));
    }
    let [q, k, v] = [q, k, v].map(rows);
    let made = cudnn_attention(&q, &k, &v, scale).expect("cuDNN takes what for_cudnn lets through");
    (made.out.shallow_clone(), Saved::Fused(made))
}

/// dout [B, H, S, Dv] → (dq, dk, dv) shaped as q, k, v.
pub fn backward(dout: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, saved: &Saved, scale: f64) -> (Tensor, Tensor, Tensor) {
    match saved {
        Saved::Probabilities(probabilities) => reference_backward(dout, q, k, v, probabilities, scale),
        Saved::Fused(made) => backward::backward(dout, [q, k, v], made, scale),
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
pub fn forward_within(documents: &[Vec<i64>], [q, k, v]: [&Tensor; 3], scale: f64) -> (Tensor, Saved) {
    let (sequences, positions) = (q.size()[0], q.size()[2]);
    assert_eq!(documents.len() as i64, sequences, "every sequence has its documents");
    let (mut outs, mut saved) = (Vec::new(), Vec::new());
    for (sequence, lengths) in documents.iter().enumerate() {
        let mut start = 0;
        for &length in lengths {
            let place = Place { sequence: sequence as i64, start, length: length.min(positions - start) };
            start += place.length;
            if place.length > 0 {
                let (out, kept) = forward(&cut(q, place), &cut(k, place), &cut(v, place), scale);
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

/// [B, H, S, D] whose last dimension is contiguous, its rows on 16 bytes: cuDNN reads others wrongly, and the copy engine not at all.
fn rows(x: &Tensor) -> Tensor {
    let strides = x.stride();
    let fits = strides[3] == 1 && strides[..3].iter().all(|stride| stride % 8 == 0) && (x.data_ptr() as usize).is_multiple_of(16);
    if fits { x.shallow_clone() } else { aligned(x) }
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
