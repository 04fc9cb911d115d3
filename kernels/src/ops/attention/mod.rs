//! Causal softmax attention whose query/key width differs from its value width (MLA: 192 and 128).
//!
//! Two ways: the reference, which keeps the probabilities, for any device and kind; and on a GPU in BF16 cuDNN's forward with a
//! backward of our own, since cuDNN's adds as threads come: both give the same bits every time. Documents that must not see each
//! other are so many attentions.
//!
//! Legend: B sequences, H heads, S positions, Dk / Dv head widths.
use super::wide;
use crate::fp8::round_up;
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
    /// Of all documents in one, without what they were lengthened by: of one position 63 others would be kept.
    FusedDocuments(Vec<Place>, CudnnAttention),
}

impl Saved {
    /// The output [B, H, S, Dv], where backward needs it.
    pub fn out(&self) -> Option<Tensor> {
        match self {
            Saved::Probabilities(_) | Saved::Documents(_) => None,
            Saved::Fused(made) | Saved::FusedDocuments(_, made) => Some(made.out.shallow_clone()),
        }
    }

    /// `out`: theirs, joined.
    fn of_documents(out: &Tensor, list: Vec<(Place, Saved)>) -> Saved {
        let sums = list.iter().map(|(place, saved)| match saved {
            Saved::Fused(made) => Some((*place, made.log_sum_exp.narrow(2, 0, place.length))),
            _ => None,
        });
        match sums.collect::<Option<Vec<_>>>() {
            None => Saved::Documents(list),
            Some(sums) => {
                let places = sums.iter().map(|(place, _)| *place).collect();
                Saved::FusedDocuments(places, CudnnAttention { out: out.shallow_clone(), log_sum_exp: joined(sums) })
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
    let within = |place: Place, saved: &Saved| {
        let made = backward(&cut(dout, place), &cut(q, place), &cut(k, place), &cut(v, place), saved, scale);
        (place, made)
    };
    let documents: Vec<_> = match saved {
        Saved::Probabilities(probabilities) => return reference_backward(dout, q, k, v, probabilities, scale),
        Saved::Fused(made) => return backward::backward(dout, [q, k, v], made, scale),
        Saved::Documents(list) => list.iter().map(|(place, saved)| within(*place, saved)).collect(),
        Saved::FusedDocuments(places, made) => {
            // Zeros behind a document again: no gradient comes to them, and a probability of exp(0 - 0) that nothing multiplies.
            let of = |place| CudnnAttention { out: cut(&made.out, place), log_sum_exp: cut(&made.log_sum_exp, place) };
            places.iter().map(|&place| within(place, &Saved::Fused(of(place)))).collect()
        }
    };
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    for (place, made) in documents {
        for (all, part) in [(&mut dq, made.0), (&mut dk, made.1), (&mut dv, made.2)] {
            all.push((place, part.narrow(2, 0, place.length)));
        }
    }
    (joined(dq), joined(dk), joined(dv))
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
    let out = joined(outs);
    let saved = Saved::of_documents(&out, saved);
    (out, saved)
}

/// On a GPU: cuDNN makes a plan of its own for every length, so documents are lengthened to multiples of 64. Attention is causal:
/// no position of a document sees the zeros behind it, and without a gradient they give none.
pub fn lengthened(positions: i64) -> i64 {
    round_up(positions, 64)
}

fn cut(x: &Tensor, Place { sequence, start, length }: Place) -> Tensor {
    let piece = x.narrow(0, sequence, 1).narrow(2, start, length);
    if x.device().is_cuda() { piece.constant_pad_nd([0, 0, 0, lengthened(length) - length]) } else { piece }
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

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// As cuDNN gives them on a GPU, of two sequences whose documents begin everywhere.
    #[test]
    fn of_lengthened_documents_their_own_positions_are_kept() {
        let (heads, positions, value) = (3, 70, 8);
        let count = 2 * heads * positions * value;
        let whole = Tensor::arange(count, (Kind::Float, Device::Cpu)).view([2, heads, positions, value]);
        let places = [(0, 0, 1), (0, 1, 69), (1, 0, 66), (1, 66, 3), (1, 69, 1)].map(|(sequence, start, length)| Place { sequence, start, length });
        let made = |place: &Place| {
            let out = cut(&whole, *place).constant_pad_nd([0, 0, 0, lengthened(place.length) - place.length]);
            assert_eq!(out.size()[2] % 64, 0);
            (*place, Saved::Fused(CudnnAttention { log_sum_exp: out.narrow(3, 0, 1) * 2.0, out }))
        };
        let outs = places.map(|place| (place, cut(&whole, place))).into_iter().collect();
        let saved = Saved::of_documents(&joined(outs), places.iter().map(made).collect());
        let Saved::FusedDocuments(kept, CudnnAttention { out, log_sum_exp }) = &saved else { panic!("they were fused") };
        assert_eq!(kept, &places);
        assert!(out.equal(&whole) && saved.out().is_some_and(|out| out.equal(&whole)), "out");
        assert!(log_sum_exp.equal(&(whole.narrow(3, 0, 1) * 2.0)), "logarithms of the sums");
        // The reference keeps each document's probabilities.
        let list = places.map(|place| (place, Saved::Probabilities(Tensor::zeros([1], (Kind::Float, Device::Cpu))))).into_iter().collect();
        assert!(matches!(Saved::of_documents(&whole, list), Saved::Documents(list) if list.len() == places.len()));
    }
}
