//! What a rank asked of its group, in a form that can be compared across ranks and printed in an error,
//! and the checks that every back end makes before anything is sent.
//! Invariant: a call that passes these checks on all ranks with equal `Call`s cannot fail half-way.

use super::{CommError, Communicator, Reduce};
use std::fmt;
use tch::{Kind, Tensor};

/// One collective as all ranks must have called it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub op: &'static str,
    pub reduce: Option<Reduce>,
    pub root: Option<usize>,
    /// Shape and kind of every tensor; `all_to_all` leaves dim 0 out, its rows differ from rank to rank.
    pub tensors: Vec<(Vec<i64>, Kind)>,
}

impl Call {
    pub fn new(op: &'static str, tensors: &[Tensor]) -> Self {
        Call { op, reduce: None, root: None, tensors: tensors.iter().map(|t| (t.size(), t.kind())).collect() }
    }
    pub fn reducing(mut self, reduce: Reduce) -> Self {
        self.reduce = Some(reduce);
        self
    }
    pub fn rooted(mut self, root: usize) -> Self {
        self.root = Some(root);
        self
    }
    pub fn rows_free(mut self) -> Self {
        for (shape, _) in &mut self.tensors {
            shape[0] = -1;
        }
        self
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.op)?;
        if let Some(reduce) = self.reduce {
            write!(f, " {reduce:?}")?;
        }
        if let Some(root) = self.root {
            write!(f, " from rank {root}")?;
        }
        let shown: Vec<String> = self.tensors.iter().take(4).map(|(shape, kind)| format!("{kind:?}{shape:?}")).collect();
        let more = if self.tensors.len() > 4 { format!(", … {} tensors", self.tensors.len()) } else { String::new() };
        write!(f, " ({}{more})", shown.join(", "))
    }
}

fn refuse<T>(op: &'static str, reason: String) -> Result<T, CommError> {
    Err(CommError::Unsupported { op, reason })
}

/// Dim 0 of every tensor, each a multiple of `divisor`.
pub(super) fn check_rows(op: &'static str, tensors: &[Tensor], divisor: usize) -> Result<(), CommError> {
    for tensor in tensors {
        let shape = tensor.size();
        match shape.first() {
            None => return refuse(op, "a scalar has no dim 0; give it one".into()),
            Some(rows) if rows % divisor as i64 != 0 => {
                return refuse(op, format!("dim 0 of {shape:?} does not divide by the {divisor} ranks"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// `send` and `recv` have an entry per rank, and every tensor has Σ send rows.
pub(super) fn check_all_to_all(tensors: &[Tensor], send: &[i64], recv: &[i64], size: usize) -> Result<(), CommError> {
    const OP: &str = "all_to_all";
    if send.len() != size || recv.len() != size {
        return refuse(OP, format!("{} send and {} receive counts for {size} ranks", send.len(), recv.len()));
    }
    if send.iter().chain(recv).any(|&rows| rows < 0) {
        return refuse(OP, format!("negative row counts: send {send:?}, recv {recv:?}"));
    }
    check_rows(OP, tensors, 1)?;
    let rows: i64 = send.iter().sum();
    match tensors.iter().find(|t| t.size()[0] != rows) {
        Some(tensor) => refuse(OP, format!("{:?} has not the {rows} rows that {send:?} sends", tensor.size())),
        None => Ok(()),
    }
}

pub(super) fn check_peer(op: &'static str, peer: usize, size: usize) -> Result<(), CommError> {
    if peer >= size { refuse(op, format!("no rank {peer} in a group of {size}")) } else { Ok(()) }
}

/// `exchange_counts` is an `all_to_all` of equal rows; every back end does it this way.
pub(super) fn exchange_counts(comm: &dyn Communicator, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError> {
    let (size, length) = (comm.size(), counts.first().map_or(0, Vec::len));
    if counts.len() != size || counts.iter().any(|c| c.len() != length) {
        let lengths: Vec<usize> = counts.iter().map(Vec::len).collect();
        return refuse("exchange_counts", format!("{size} ranks need {size} lists of one length, not {lengths:?}"));
    }
    let rows = vec![length as i64; size];
    let all = comm.all_to_all(vec![Tensor::from_slice(&counts.concat())], &rows, &rows)?.wait()?;
    let all = Vec::<i64>::try_from(&all[0]).expect("i64 counts");
    Ok((0..size).map(|rank| all[rank * length..(rank + 1) * length].to_vec()).collect())
}

/// First row of each rank's piece, for `counts` rows a rank.
pub(super) fn offsets(counts: &[i64]) -> Vec<i64> {
    counts
        .iter()
        .scan(0, |next, rows| {
            *next += rows;
            Some(*next - rows)
        })
        .collect()
}
