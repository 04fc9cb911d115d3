//! Counts what this rank sends, inside its node and between nodes, whatever carries it.
//! Invariant: a collective counts as its definition says (scatter, add, gather), not as a back end may shorten
//! it; so the figures of all back ends are equal and can be held against a formula.

use super::{Comm, CommError, Communicator, Pending, Reduce, TensorSpec, Work};
use std::cell::Cell;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// Bytes sent by this rank so far.
#[derive(Debug, Default)]
pub struct Traffic {
    inside: Cell<u64>,
    between: Cell<u64>,
}

impl Traffic {
    /// To other ranks of its own node.
    pub fn inside_bytes(&self) -> u64 {
        self.inside.get()
    }
    /// To other nodes.
    pub fn between_bytes(&self) -> u64 {
        self.between.get()
    }
}

/// `comm` with its traffic counted. `nodes`: the node of every rank of the group. Sub-groups split from it count
/// into the same `Traffic`.
pub fn counted(comm: Comm, nodes: &[usize]) -> (Comm, Rc<Traffic>) {
    assert_eq!(nodes.len(), comm.size(), "a node for every rank");
    let traffic = Rc::new(Traffic::default());
    (Rc::new(Counted { comm, nodes: nodes.to_vec(), traffic: traffic.clone() }), traffic)
}

struct Counted {
    comm: Comm,
    nodes: Vec<usize>,
    traffic: Rc<Traffic>,
}

fn bytes(tensors: &[Tensor]) -> u64 {
    tensors.iter().map(|t| (t.numel() * t.kind().elt_size_in_bytes()) as u64).sum()
}

/// Bytes of the `rank`-th share of each tensor.
fn share_bytes(tensors: &[Tensor], rank: usize, size: usize) -> u64 {
    let at = |n: u64, r: usize| n * r as u64 / size as u64;
    tensors.iter().map(|t| (at(t.numel() as u64, rank + 1) - at(t.numel() as u64, rank)) * t.kind().elt_size_in_bytes() as u64).sum()
}

impl Counted {
    fn add(&self, peer: usize, bytes: u64) {
        let me = self.comm.rank();
        if peer != me {
            let counter = if self.nodes[peer] == self.nodes[me] { &self.traffic.inside } else { &self.traffic.between };
            counter.set(counter.get() + bytes);
        }
    }

    fn to_all(&self, bytes: impl Fn(usize) -> u64) {
        (0..self.comm.size()).for_each(|peer| self.add(peer, bytes(peer)));
    }
}

impl Communicator for Counted {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn all_reduce(&self, tensors: Vec<Tensor>, op: Reduce) -> Result<Pending<Vec<Tensor>>, CommError> {
        let mine = share_bytes(&tensors, self.rank(), self.size());
        self.to_all(|peer| share_bytes(&tensors, peer, self.size()) + mine);
        self.comm.all_reduce(tensors, op)
    }

    fn reduce_scatter(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.to_all(|peer| share_bytes(&tensors, peer, self.size()));
        self.comm.reduce_scatter(tensors)
    }

    fn all_gather(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.to_all(|_| bytes(&tensors));
        self.comm.all_gather(tensors)
    }

    /// Counted at the root, once a peer.
    fn broadcast(&self, tensors: Vec<Tensor>, root: usize) -> Result<Pending<Vec<Tensor>>, CommError> {
        if self.rank() == root {
            self.to_all(|_| bytes(&tensors));
        }
        self.comm.broadcast(tensors, root)
    }

    fn exchange_counts(&self, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError> {
        counts.iter().enumerate().for_each(|(peer, list)| self.add(peer, size_of_val(&list[..]) as u64));
        self.comm.exchange_counts(counts)
    }

    fn all_to_all_under(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64], work: Work) -> Result<Pending<Vec<Tensor>>, CommError> {
        let rows: i64 = send.iter().sum();
        // Every row of a tensor has the same bytes; no rows, no bytes.
        let row_bytes = if rows > 0 { bytes(&tensors) / rows as u64 } else { 0 };
        send.iter().enumerate().for_each(|(peer, &rows)| self.add(peer, rows as u64 * row_bytes));
        self.comm.all_to_all_under(tensors, send, recv, work)
    }

    fn exchange(&self, sends: Vec<(usize, Tensor)>, recvs: Vec<(usize, TensorSpec)>) -> Result<Pending<Vec<Tensor>>, CommError> {
        sends.iter().for_each(|(peer, tensor)| self.add(*peer, bytes(std::slice::from_ref(tensor))));
        self.comm.exchange(sends, recvs)
    }

    fn exchange_into(&self, sends: Vec<(usize, Tensor)>, places: Vec<(usize, Tensor)>) -> Result<Pending<()>, CommError> {
        sends.iter().for_each(|(peer, tensor)| self.add(*peer, bytes(std::slice::from_ref(tensor))));
        self.comm.exchange_into(sends, places)
    }

    fn room(&self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, CommError> {
        self.comm.room(shape, kind, device)
    }

    fn lands_in_place(&self) -> bool {
        self.comm.lands_in_place()
    }

    fn buffer_bytes(&self) -> usize {
        self.comm.buffer_bytes()
    }

    fn split(&self, colour: usize, key: usize) -> Result<Comm, CommError> {
        let comm = self.comm.split(colour, key)?;
        let mine = Tensor::from_slice(&[self.nodes[self.rank()] as i64]);
        let nodes = Vec::<i64>::try_from(&comm.all_gather(vec![mine])?.wait()?[0]).expect("i64 nodes");
        let nodes = nodes.into_iter().map(|node| node as usize).collect();
        Ok(Rc::new(Counted { comm, nodes, traffic: self.traffic.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::run_local;
    use tch::{Device, Kind};

    #[test]
    fn bytes_equal_their_formulas_inside_and_between_nodes() {
        run_local(4, |comm| {
            let (comm, traffic) = counted(comm, &[0, 0, 1, 1]);
            let zeros = |shape: &[i64]| vec![Tensor::zeros(shape, (Kind::Float, Device::Cpu))];
            let grown = |before: (u64, u64)| (traffic.inside_bytes() - before.0, traffic.between_bytes() - before.1);
            let now = || (traffic.inside_bytes(), traffic.between_bytes());

            let before = now();
            let _ = comm.all_reduce(zeros(&[4, 8]), Reduce::Sum).unwrap().wait().unwrap();
            assert_eq!(grown(before), (2 * 32, 2 * 2 * 32));
            let before = now();
            let _ = comm.reduce_scatter(zeros(&[4, 8])).unwrap().wait().unwrap();
            assert_eq!(grown(before), (32, 64));
            let before = now();
            let _ = comm.all_gather(zeros(&[3])).unwrap().wait().unwrap();
            assert_eq!(grown(before), (12, 24));

            // Rank r sends p + 1 rows of 5 floats to p.
            let before = now();
            let recv = vec![comm.rank() as i64 + 1; 4];
            let _ = comm.all_to_all(zeros(&[10, 5]), &[1, 2, 3, 4], &recv).unwrap().wait().unwrap();
            let rows = |peer: usize| (peer as u64 + 1) * 20;
            let neighbour = comm.rank() ^ 1;
            assert_eq!(grown(before), (rows(neighbour), (0..4).filter(|p| p / 2 != comm.rank() / 2).map(rows).sum()));

            // A pair on two nodes: nothing inside.
            let pair = comm.split(comm.rank() % 2, 0).unwrap();
            let before = now();
            let _ = pair.broadcast(zeros(&[7]), 0).unwrap().wait().unwrap();
            assert_eq!(grown(before), if pair.rank() == 0 { (0, 28) } else { (0, 0) });
            let _ = pair.exchange_counts(&[vec![1, 2], vec![3, 4]]).unwrap();
            assert_eq!(traffic.between_bytes() - before.1, if pair.rank() == 0 { 28 + 16 } else { 16 });
        });
    }
}
