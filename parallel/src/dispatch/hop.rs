//! One hop of a row's way to its experts, and back. A row carries slots: for each of its choices the expert, counted
//! within the group that the row is in, or −1 where that expert is elsewhere. It goes once to each rank that holds one.
//!
//! Invariant: sums are gathers over fixed places, never scattered additions, so they have one order.
//!
//! Legend: V rows here, K slots a row, P ranks of the hop, S rows sent, X experts a rank.
use crate::comm::{Comm, CommError, Pending, Work};
use kernels::ops::routes::{self, Places};
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

impl Hop {
    /// slots [V, K] i32. No host wait: how many rows there are is known.
    pub fn places(&self, slots: &Tensor) -> Places {
        routes::places(slots, self.share, self.send.len() as i64, self.send.iter().sum())
    }

    /// Rows of each part [S, …], by destination, go out. `work`: as `all_to_all_under`.
    pub fn out(&self, parts: Vec<Tensor>, work: Work) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.comm.all_to_all_under(parts, &self.send, &self.recv, work)
    }

    /// One row of each part for each that came goes back. Those that stay here are made while the others travel.
    pub fn back(&self, parts: Vec<Back>) -> Result<Pending<Vec<Tensor>>, CommError> {
        let (rank, size) = (self.comm.rank(), self.send.len());
        let (from, to) = (starts(&self.recv), starts(&self.send));
        let out = |part: &Back| self.comm.room(&part.shape(to[size]), part.rows.kind(), part.rows.device());
        let outs: Vec<Tensor> = parts.iter().map(out).collect::<Result<_, _>>()?;
        let (mut sends, mut places) = (Vec::new(), Vec::new());
        for (part, out) in parts.iter().zip(&outs) {
            for peers in [0..rank, rank + 1..size] {
                let first = from[peers.start];
                let made = Tensor::empty(part.shape(from[peers.end] - first), (part.rows.kind(), part.rows.device()));
                part.make(first, &made);
                sends.extend(peers.clone().map(|peer| (peer, made.narrow(0, from[peer] - first, self.recv[peer]))));
                places.extend(peers.map(|peer| (peer, out.narrow(0, to[peer], self.send[peer]))));
            }
        }
        let back = self.comm.exchange_into(sends, places)?;
        parts.iter().zip(&outs).for_each(|(part, out)| part.make(from[rank], &out.narrow(0, to[rank], self.send[rank])));
        Ok(back.map(|()| Ok(outs)))
    }
}

/// What goes back of a part: its rows as they are, or for each place of `sums` [V, P] (−1: nowhere) the sum of those there.
pub(super) struct Back {
    pub rows: Tensor,
    pub sums: Option<Tensor>,
}

impl Back {
    /// Of so many rows.
    fn shape(&self, rows: i64) -> Vec<i64> {
        let mut shape = self.rows.size();
        shape[0] = rows;
        shape
    }

    /// Those from `first` on, as many as `out` has room for.
    fn make(&self, first: i64, out: &Tensor) {
        let (mut out, count) = (out.shallow_clone(), out.size()[0]);
        match &self.sums {
            _ if count == 0 => (),
            None => out.copy_(&self.rows.narrow(0, first, count)),
            Some(places) if fused(&self.rows) => unpermute::forward_into(&out, &self.rows.contiguous(), &places.narrow(0, first, count), &[]),
            Some(places) => out.copy_(&sum_places(&self.rows, &places.narrow(0, first, count), &[])),
        }
    }
}

/// First row of each rank's, and of those after them.
fn starts(counts: &[i64]) -> Vec<i64> {
    (0..=counts.len()).map(|rank| counts[..rank].iter().sum()).collect()
}

/// Is there a kernel that sums these rows?
fn fused(rows: &Tensor) -> bool {
    rows.device().is_cuda() && rows.kind() == Kind::BFloat16 && rows.size()[1] % 8 == 0
}

/// Rows of each part [V, …] → by destination, [S, …].
pub(super) fn by_destination(parts: &[Tensor], places: &Places) -> Vec<Tensor> {
    parts.iter().map(|part| part.index_select(0, &places.source)).collect()
}

/// rows [R, …], index (flat; −1: nowhere, which is zero) → those rows.
pub(super) fn picked(rows: &Tensor, index: &Tensor) -> Tensor {
    let mut shape = rows.size();
    shape[0] = 1;
    let with_zero = Tensor::cat(&[rows, &Tensor::zeros(&shape, (rows.kind(), rows.device()))], 0);
    with_zero.index_select(0, &index.remainder(rows.size()[0] + 1))
}

/// rows [R, D], places [M, P] i32 (−1: nowhere), add, up to two [M, D] → these and the sum over P of the rows there, [M, D], taken in at
/// least FP32.
pub(super) fn sum_places(rows: &Tensor, places: &Tensor, add: &[&Tensor]) -> Tensor {
    let (count, each) = places.size2().expect("places [M, P]");
    if fused(rows) {
        return unpermute::forward(&rows.contiguous(), places, add);
    }
    let wide = if rows.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let picked = picked(rows, &places.flatten(0, -1)).view([count, each, rows.size()[1]]);
    // Rounded before the addition, as what has travelled is: with two experts a token a layout is one rank, bit for bit.
    let sum = picked.sum_dim_intlist(&[1i64][..], false, wide).to_kind(rows.kind());
    add.iter().fold(sum, |sum, add| sum + *add)
}
