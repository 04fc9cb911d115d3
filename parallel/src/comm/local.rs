//! N ranks as N threads of one process: the back end of most tests, and of a run without MPI.
//! Invariants: what is posted is a copy, so a rank may go on (and write to its own tensors) before its peers
//! have read; a wait ends as soon as all peers have *posted*, so the order of waits is free; when every rank
//! that still runs waits, nothing can happen any more and all get `CommError::Lost` instead of hanging.

use super::call::{self, Call};
use super::sum;
use super::{Comm, CommError, Communicator, Pending, Reduce, TensorSpec, Work};
use rendezvous::{Post, World};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

mod rendezvous;

pub use rendezvous::Link;

/// Below this many elements in all, each rank sums for itself instead of sharing the work.
const SHARE_FROM: i64 = 4 * sum::BLOCK;

/// Runs `f` once per rank, each on a thread of its own with its world communicator; results in rank order.
/// A rank that panics takes the others out of their waits with `CommError::Lost`; the first panic is passed on.
/// Torch's intra-op threads come on top of the ranks: callers that mind set `tch::set_num_threads(1)`.
pub fn run_local<R: Send>(size: usize, f: impl Fn(Comm) -> R + Sync) -> Vec<R> {
    run_linked(size, Link::INSTANT, f)
}

/// `run_local` with transfers that take time but no processor: shows whether they are hidden under computation.
pub fn run_linked<R: Send>(size: usize, link: Link, f: impl Fn(Comm) -> R + Sync) -> Vec<R> {
    assert!(size > 0, "a world has at least one rank");
    let world = World::new(size, link);
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let (world, f) = (&world, &f);
        let threads: Vec<_> = (0..size)
            .map(|rank| {
                scope.spawn(move || {
                    let comm: Comm = Rc::new(LocalComm::new(world.clone(), 0, (0..size).collect(), rank));
                    let outcome = catch_unwind(AssertUnwindSafe(|| f(comm)));
                    world.leave(rank, outcome.is_err());
                    outcome
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("panics are caught inside")).collect()
    });
    let first_panicked = world.first_panicked();
    let mut results = Vec::with_capacity(size);
    let mut panics = Vec::new();
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Ok(result) => results.push(result),
            Err(payload) => panics.push((rank, payload)),
        }
    }
    // The others' panics are mostly "lost my peers": the first one is the cause.
    if let Some(index) = panics.iter().position(|(rank, _)| Some(*rank) == first_panicked) {
        resume_unwind(panics.swap_remove(index).1);
    }
    results
}

/// A group of one.
pub fn solo() -> Comm {
    Rc::new(LocalComm::new(World::new(1, Link::INSTANT), 0, vec![0], 0))
}

#[derive(Clone)]
struct LocalComm(Rc<Inner>);

struct Inner {
    world: Arc<World>,
    group: usize,
    /// World ranks of the members, in this group's order.
    members: Vec<usize>,
    rank: usize,
    next_op: Cell<u64>,
    /// Messages so far to and from each peer: the k-th send meets the k-th receive.
    sent: RefCell<Vec<u64>>,
    expected: RefCell<Vec<u64>>,
}

impl LocalComm {
    fn new(world: Arc<World>, group: usize, members: Vec<usize>, rank: usize) -> Self {
        let (sent, expected) = (RefCell::new(vec![0; members.len()]), RefCell::new(vec![0; members.len()]));
        LocalComm(Rc::new(Inner { world, group, members, rank, next_op: Cell::new(0), sent, expected }))
    }

    /// Posts this rank's part of the next collective and returns its number.
    fn post(&self, call: Call, tensors: &[Tensor], send: &[i64]) -> Result<u64, CommError> {
        let inner = &self.0;
        let op = inner.next_op.replace(inner.next_op.get() + 1);
        let post = Post { tensors: tensors.iter().map(copied).collect(), send: send.to_vec() };
        inner.world.post((inner.group, op), inner.rank, inner.members.len(), call, post)?;
        Ok(op)
    }

    /// Waits until all have posted, then hands `read` everyone's part.
    fn collect<T>(&self, op: u64, name: &'static str, read: impl FnOnce(&[Post]) -> Result<T, CommError>) -> Result<T, CommError> {
        let inner = &self.0;
        let posts = inner.world.wait_posts((inner.group, op), inner.rank, inner.members[inner.rank], inner.members.len(), name)?;
        let value = read(&posts);
        drop(posts);
        inner.world.taken((inner.group, op), inner.members.len());
        value
    }

    fn pending<T: 'static>(&self, op: u64, name: &'static str, read: impl FnOnce(&LocalComm, &[Post]) -> Result<T, CommError> + 'static) -> Pending<T> {
        let comm = self.clone();
        Pending::running(move || comm.collect(op, name, |posts| read(&comm, posts)))
    }
}

/// A contiguous copy that shares nothing with `tensor`.
fn copied(tensor: &Tensor) -> Tensor {
    let mut copy = empty(&tensor.size(), tensor.kind(), tensor.device());
    tch::no_grad(|| copy.copy_(tensor));
    copy
}

fn empty(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    Tensor::empty(shape, (kind, device))
}

/// Rows `pieces` (tensor, first row, rows) one after the other, as a new tensor.
fn stacked(pieces: &[(Tensor, i64, i64)]) -> Tensor {
    let like = &pieces[0].0;
    let mut shape = like.size();
    shape[0] = pieces.iter().map(|(_, _, rows)| rows).sum();
    let out = empty(&shape, like.kind(), like.device());
    let mut next = 0;
    for (source, first, rows) in pieces.iter().filter(|(_, _, rows)| *rows > 0) {
        tch::no_grad(|| out.narrow(0, next, *rows).copy_(&source.narrow(0, *first, *rows)));
        next += rows;
    }
    out
}

impl Communicator for LocalComm {
    fn rank(&self) -> usize {
        self.0.rank
    }

    fn size(&self) -> usize {
        self.0.members.len()
    }

    fn all_reduce(&self, tensors: Vec<Tensor>, reduce: Reduce) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "all_reduce";
        sum::check_reducible(OP, &tensors, reduce)?;
        if self.size() == 1 {
            return Ok(Pending::ready(tensors));
        }
        let op = self.post(Call::new(OP, &tensors).reducing(reduce), &tensors, &[])?;
        Ok(self.pending(op, OP, move |comm, posts| {
            let total: i64 = posts[0].tensors.iter().map(|t| t.numel() as i64).sum();
            if total >= SHARE_FROM {
                let who = (comm.0.rank, comm.0.members[comm.0.rank]);
                return comm.0.world.shared_sum((comm.0.group, op), who, posts, reduce);
            }
            Ok((0..posts[0].tensors.len()).map(|i| whole_sum(posts, i, reduce)).collect())
        }))
    }

    fn reduce_scatter(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "reduce_scatter";
        sum::check_reducible(OP, &tensors, Reduce::Sum)?;
        call::check_rows(OP, &tensors, self.size())?;
        if self.size() == 1 {
            return Ok(Pending::ready(tensors));
        }
        let op = self.post(Call::new(OP, &tensors), &tensors, &[])?;
        Ok(self.pending(op, OP, |comm, posts| {
            Ok((0..posts[0].tensors.len()).map(|i| piece_sum(posts, i, comm.rank(), comm.size())).collect())
        }))
    }

    fn all_gather(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "all_gather";
        call::check_rows(OP, &tensors, 1)?;
        if self.size() == 1 {
            return Ok(Pending::ready(tensors));
        }
        let op = self.post(Call::new(OP, &tensors), &tensors, &[])?;
        Ok(self.pending(op, OP, |_, posts| {
            let whole = |i: usize| posts.iter().map(|p| (p.tensors[i].shallow_clone(), 0, p.tensors[i].size()[0])).collect::<Vec<_>>();
            Ok((0..posts[0].tensors.len()).map(|i| stacked(&whole(i))).collect())
        }))
    }

    fn broadcast(&self, tensors: Vec<Tensor>, root: usize) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "broadcast";
        call::check_peer(OP, root, self.size())?;
        if self.size() == 1 {
            return Ok(Pending::ready(tensors));
        }
        let call = Call::new(OP, &tensors).rooted(root);
        let mine: &[Tensor] = if self.rank() == root { &tensors } else { &[] };
        let op = self.post(call, mine, &[])?;
        Ok(self.pending(op, OP, move |_, posts| Ok(posts[root].tensors.iter().map(copied).collect())))
    }

    fn exchange_counts(&self, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError> {
        call::exchange_counts(self, counts)
    }

    fn all_to_all_under(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64], work: Work) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "all_to_all";
        call::check_all_to_all(&tensors, send, recv, self.size())?;
        if send == recv && self.size() == 1 {
            work();
            return Ok(Pending::ready(tensors));
        }
        let op = self.post(Call::new(OP, &tensors).rows_free(), &tensors, send)?;
        work();
        let recv = recv.to_vec();
        Ok(self.pending(op, OP, move |comm, posts| {
            let me = comm.rank();
            if let Some(peer) = (0..comm.size()).find(|&p| posts[p].send[me] != recv[p]) {
                let (mine, theirs) = (format!("all_to_all receiving {recv:?}"), format!("all_to_all sending {:?}", posts[peer].send));
                return Err(CommError::Disagree { rank: me, peer, mine, theirs });
            }
            let firsts: Vec<i64> = posts.iter().map(|p| call::offsets(&p.send)[me]).collect();
            let pieces = |i: usize| (0..comm.size()).map(|p| (posts[p].tensors[i].shallow_clone(), firsts[p], recv[p])).collect::<Vec<_>>();
            Ok((0..posts[me].tensors.len()).map(|i| stacked(&pieces(i))).collect())
        }))
    }

    fn exchange(&self, sends: Vec<(usize, Tensor)>, recvs: Vec<(usize, TensorSpec)>) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "exchange";
        for peer in sends.iter().map(|s| s.0).chain(recvs.iter().map(|r| r.0)) {
            call::check_peer(OP, peer, self.size())?;
        }
        let inner = &self.0;
        for (to, tensor) in &sends {
            let number = inner.sent.borrow()[*to];
            inner.sent.borrow_mut()[*to] += 1;
            inner.world.send((inner.group, inner.rank, *to, number), copied(tensor));
        }
        let awaited: Vec<_> = recvs
            .into_iter()
            .map(|(from, spec)| {
                let number = inner.expected.borrow()[from];
                inner.expected.borrow_mut()[from] += 1;
                ((inner.group, from, inner.rank, number), spec)
            })
            .collect();
        if awaited.is_empty() {
            return Ok(Pending::ready(Vec::new()));
        }
        let comm = self.clone();
        Ok(Pending::running(move || {
            let inner = &comm.0;
            let mut received = Vec::with_capacity(awaited.len());
            // All are taken, also after a mismatch, so that nothing is left over for a later receive.
            for (key, spec) in awaited {
                let tensor = inner.world.receive(key, inner.members[inner.rank], inner.members.len())?;
                received.push(matching(tensor, &spec, inner.rank, key.1));
            }
            received.into_iter().collect()
        }))
    }

    fn split(&self, colour: usize, key: usize) -> Result<Comm, CommError> {
        const OP: &str = "split";
        let mine = Tensor::from_slice(&[colour as i64, key as i64]);
        let inner = &self.0;
        let op = self.post(Call::new(OP, std::slice::from_ref(&mine)), &[mine], &[])?;
        let mut chosen: Vec<(usize, usize)> = self.collect(op, OP, |posts| {
            let value = |rank: usize, i: i64| posts[rank].tensors[0].int64_value(&[i]) as usize;
            Ok((0..self.size()).filter(|&r| value(r, 0) == colour).map(|r| (value(r, 1), r)).collect())
        })?;
        chosen.sort_unstable();
        let rank = chosen.iter().position(|&(_, r)| r == inner.rank).expect("this rank chose the colour");
        let members = chosen.iter().map(|&(_, r)| inner.members[r]).collect();
        let group = inner.world.subgroup(inner.group, op, colour);
        Ok(Rc::new(LocalComm::new(inner.world.clone(), group, members, rank)))
    }
}

/// Sum of everyone's i-th tensor.
fn whole_sum(posts: &[Post], i: usize, reduce: Reduce) -> Tensor {
    let like = &posts[0].tensors[i];
    let parts: Vec<Tensor> = posts.iter().map(|p| p.tensors[i].view([-1])).collect();
    let out = empty(&like.size(), like.kind(), like.device());
    sum::fold(&out.view([-1]), &parts, reduce);
    out
}

/// Sum of the `rank`-th piece of everyone's i-th tensor.
fn piece_sum(posts: &[Post], i: usize, rank: usize, size: usize) -> Tensor {
    let like = &posts[0].tensors[i];
    let mut shape = like.size();
    shape[0] /= size as i64;
    let length: i64 = shape.iter().product();
    let parts: Vec<Tensor> = posts.iter().map(|p| p.tensors[i].view([-1]).narrow(0, rank as i64 * length, length)).collect();
    let out = empty(&shape, like.kind(), like.device());
    sum::fold(&out.view([-1]), &parts, Reduce::Sum);
    out
}

fn matching(tensor: Tensor, spec: &TensorSpec, rank: usize, peer: usize) -> Result<Tensor, CommError> {
    if tensor.size() == spec.shape && tensor.kind() == spec.kind {
        return Ok(if tensor.device() == spec.device { tensor } else { tensor.to_device(spec.device) });
    }
    let mine = format!("exchange receiving {:?}{:?}", spec.kind, spec.shape);
    let theirs = format!("exchange sending {:?}{:?}", tensor.kind(), tensor.size());
    Err(CommError::Disagree { rank, peer, mine, theirs })
}

#[cfg(test)]
mod tests;
