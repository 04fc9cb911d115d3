//! One hop of a row's way to its experts, and back. A row carries slots: for each of its choices the expert, counted
//! within the group that the row is in, or −1 where that expert is elsewhere. It goes once to each rank that holds one.
//!
//! Invariant: sums are gathers over fixed places, never scattered additions, so they have one order.
//!
//! Legend: V rows here, K slots a row, P ranks of the hop, S rows sent, X experts a rank.
use crate::comm::{Comm, CommError, Pending};
use kernels::ops::unpermute;
use tch::{Kind, Tensor};

/// Between which ranks, and how many rows.
pub(super) struct Hop {
    pub comm: Comm,
    pub send: Vec<i64>,
    pub recv: Vec<i64>,
    /// Experts of each rank.
    pub share: i64,
}

/// Which rows go where.
pub(super) struct Places {
    /// The row of each sent row, [S], by destination, then row.
    source: Tensor,
    /// The slots of each sent row as its destination counts them, [S, K] i32.
    slots: Tensor,
    /// The sent row of (row, rank), [V, P]; S where none goes.
    sent_row: Tensor,
}

impl Hop {
    /// slots [V, K]. No host wait: how many rows there are is known.
    pub fn places(&self, slots: &Tensor) -> Places {
        let (rows, ranks, sent) = (slots.size()[0], self.send.len() as i64, self.send.iter().sum::<i64>());
        let options = (Kind::Int64, slots.device());
        // "Elsewhere" becomes rank P, which is cut off.
        let destination = slots.to_kind(Kind::Int64).divide_scalar_mode(self.share, "floor").remainder(ranks + 1);
        let wanted = Tensor::zeros([rows, ranks + 1], options).scatter_value(1, &destination, 1).narrow(1, 0, ranks);
        let wanted = wanted.tr().flatten(0, -1); // [P · V]: by rank, then row
        let place = (wanted.cumsum(0, Kind::Int64) - 1).masked_fill(&wanted.eq(0), sent);
        let pair = Tensor::zeros([sent + 1], options).scatter(0, &place, &arange(ranks * rows, slots)).narrow(0, 0, sent);
        let rank = pair.divide_scalar_mode(rows.max(1), "floor");
        let source = &pair - &rank * rows;
        let slots = slots.index_select(0, &source) - (rank * self.share).unsqueeze(1);
        let elsewhere = slots.lt(0).logical_or(&slots.ge(self.share));
        let slots = slots.masked_fill(&elsewhere, -1).to_kind(Kind::Int);
        Places { source, slots, sent_row: place.view([ranks, rows]).tr().contiguous() }
    }

    /// Rows of each part [V, …] go out. With `slots`, those go too, as the last part.
    pub fn out(&self, parts: &[Tensor], places: &Places, slots: bool) -> Result<Pending<Vec<Tensor>>, CommError> {
        let mut sent: Vec<Tensor> = parts.iter().map(|part| part.index_select(0, &places.source)).collect();
        if slots {
            sent.push(places.slots.shallow_clone());
        }
        self.comm.all_to_all(sent, &self.send, &self.recv)
    }

    /// One row for each that came, of each part, goes back.
    pub fn back(&self, parts: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.comm.all_to_all(parts, &self.recv, &self.send)
    }
}

impl Places {
    pub fn tensors(&self) -> [&Tensor; 3] {
        [&self.source, &self.slots, &self.sent_row]
    }

    /// What came back [S, …] → the sum of each row's, [V, …].
    pub fn sum(&self, back: &Tensor) -> Tensor {
        sum_places(back, &self.sent_row)
    }
}

/// Rows at their experts.
pub(super) struct Local {
    /// The flat (row, slot) of each local row, [R], by expert, then row.
    pub pair: Tensor,
    /// The row of each local row, [R].
    pub row: Tensor,
    /// The local row of each (row, slot), [V, K]; R where that slot's expert is elsewhere.
    pub place: Tensor,
}

impl Local {
    /// slots [V, K], `count` of them local to this rank's `share` experts.
    pub fn new(slots: &Tensor, share: i64, count: i64) -> Self {
        let (rows, top_k) = slots.size2().expect("slots [V, K]");
        let expert = slots.to_kind(Kind::Int64).flatten(0, -1).remainder(share + 1); // elsewhere: the last
        // Stable: rows of one expert stay in their order.
        let pair = expert.argsort_stable(true, 0, false).narrow(0, 0, count);
        let place = Tensor::full_like(&expert, count).scatter(0, &pair, &arange(count, slots)).view([rows, top_k]);
        Local { row: pair.divide_scalar_mode(top_k, "floor"), pair, place }
    }
}

fn arange(count: i64, like: &Tensor) -> Tensor {
    Tensor::arange(count, (Kind::Int64, like.device()))
}

/// One more row, of zeros: what an index of "nowhere" finds.
pub(super) fn with_zero(rows: &Tensor) -> Tensor {
    let mut shape = rows.size();
    shape[0] = 1;
    Tensor::cat(&[rows, &Tensor::zeros(&shape, (rows.kind(), rows.device()))], 0)
}

/// rows [R, D], places [M, P] (R: nowhere) → the sum over P of the rows there, [M, D], taken in at least FP32.
pub(super) fn sum_places(rows: &Tensor, places: &Tensor) -> Tensor {
    let (count, each) = places.size2().expect("places [M, P]");
    if rows.device().is_cuda() && rows.kind() == Kind::BFloat16 && rows.size()[1] % 8 == 0 {
        let index = places.masked_fill(&places.eq(rows.size()[0]), -1).to_kind(Kind::Int);
        return unpermute::forward(&rows.contiguous(), &index, None, None);
    }
    let wide = if rows.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let picked = with_zero(rows).index_select(0, &places.flatten(0, -1)).view([count, each, rows.size()[1]]);
    picked.sum_dim_intlist(&[1i64][..], false, wide).to_kind(rows.kind())
}
