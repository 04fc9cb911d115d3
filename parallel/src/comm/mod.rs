//! What ranks say to each other. One trait, three back ends with one behaviour: `local` (ranks are threads),
//! `mpi` (ranks are processes), `nccl` (ranks are GPUs; on one host `peer` moves what it moves). DESIGN: the order of collectives is the order of the
//! program; reductions add in rank order, so one layout gives one result whatever carries it.
//!
//! Legend: N = size of the group, a "row" = one index of dim 0.

mod call;
pub mod checked;
pub mod counted;
pub mod local;
pub mod mpi;
pub mod nccl;
pub mod peer;
mod sum;
pub mod watched;

use std::rc::Rc;
use tch::{Device, Kind, Tensor};

#[derive(Debug, thiserror::Error)]
pub enum CommError {
    #[error("{op} of {size} ranks failed at number {rank} of them: {reason}")]
    Lost { rank: usize, size: usize, op: &'static str, reason: String },
    #[error("rank {rank} called {mine}, but rank {peer} called {theirs}")]
    Disagree { rank: usize, peer: usize, mine: String, theirs: String },
    #[error("{op}: {reason}")]
    Unsupported { op: &'static str, reason: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Max,
    Min,
}

/// Shape and type of a tensor that will be received.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    pub shape: Vec<i64>,
    pub kind: Kind,
    pub device: Device,
}

/// A transfer under way. It owns its buffers; dropping one that was not waited on waits.
#[must_use]
pub struct Pending<T>(PendingState<T>);

enum PendingState<T> {
    Ready(T),
    Running(Finish<T>),
    Staged(Finish<Pending<T>>),
    Taken,
}

type Finish<T> = Box<dyn FnOnce() -> Result<T, CommError>>;

impl<T: 'static> Pending<T> {
    /// A result that is already there (groups of one, synchronous back ends).
    pub fn ready(value: T) -> Self {
        Pending(PendingState::Ready(value))
    }
    /// `finish` makes the compute stream (on the CPU: the caller) wait and hands the result out.
    pub fn running(finish: impl FnOnce() -> Result<T, CommError> + 'static) -> Self {
        Pending(PendingState::Running(Box::new(finish)))
    }
    /// `next` waits for what is under way and posts the transfer that follows from it.
    pub fn staged(next: impl FnOnce() -> Result<Pending<T>, CommError> + 'static) -> Self {
        Pending(PendingState::Staged(Box::new(next)))
    }
    /// `f` of the result, when it is waited for.
    pub fn map<U: 'static>(mut self, f: impl FnOnce(T) -> Result<U, CommError> + 'static) -> Pending<U> {
        match self.take() {
            PendingState::Staged(next) => Pending::staged(move || Ok(next()?.map(f))),
            state => Pending::running(move || f(Pending(state).wait()?)),
        }
    }
    /// Posts the transfer that follows from the one under way, if there is one, so that it, too, can pass while
    /// something is computed. Waits for the one under way. A collective like any: at the same place on all ranks.
    /// Whether there was one to post.
    pub fn advance(&mut self) -> Result<bool, CommError> {
        let (state, posted) = match self.take() {
            PendingState::Staged(next) => (next()?.take(), true),
            state => (state, false),
        };
        self.0 = state;
        Ok(posted)
    }
    pub fn wait(mut self) -> Result<T, CommError> {
        loop {
            match self.take() {
                PendingState::Ready(value) => return Ok(value),
                PendingState::Running(finish) => return finish(),
                PendingState::Staged(next) => self.0 = next()?.take(),
                PendingState::Taken => unreachable!("a Pending is waited on once, and not after an error"),
            }
        }
    }
}

impl<T> Pending<T> {
    fn take(&mut self) -> PendingState<T> {
        std::mem::replace(&mut self.0, PendingState::Taken)
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        // The peers count on these transfers; an error will show at the next one.
        match self.take() {
            PendingState::Running(finish) => drop(finish()),
            PendingState::Staged(next) => drop(next()),
            PendingState::Ready(_) | PendingState::Taken => {}
        }
    }
}

/// Called once, amid a call.
pub type Work<'a> = &'a mut dyn FnMut();

/// One group of ranks along one axis. Not `Send`: a communicator belongs to its rank's thread.
/// Tensors are passed by value; every rank of the group makes the same calls in the same order with the
/// same shapes and kinds. A group of one is a real group: it may hand the very tensor back.
/// A tensor passed in must not be written to through another handle before the transfer has been waited on.
/// `#[track_caller]` lets `checked` name the caller's line.
pub trait Communicator {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// Element-wise, added in rank order; integers as integers, BF16 in FP32 then rounded once.
    #[track_caller]
    fn all_reduce(&self, tensors: Vec<Tensor>, op: Reduce) -> Result<Pending<Vec<Tensor>>, CommError>;
    /// Dim 0 must divide by N; rank r gets the r-th piece of the sum.
    #[track_caller]
    fn reduce_scatter(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError>;
    /// Concatenated along dim 0 in rank order.
    #[track_caller]
    fn all_gather(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError>;
    /// `root`'s tensors everywhere; the others pass tensors of the same shape (contents ignored).
    #[track_caller]
    fn broadcast(&self, tensors: Vec<Tensor>, root: usize) -> Result<Pending<Vec<Tensor>>, CommError>;
    /// `counts[p]` goes to rank p (all of one length); the result's `[p]` came from rank p. Waits on the host.
    #[track_caller]
    fn exchange_counts(&self, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError>;
    /// Rows sorted by destination; `send[p]` rows go to rank p, `recv[p]` come from it (any count ≥ 0). Each
    /// tensor's result has Σ recv rows in rank order.
    #[track_caller]
    fn all_to_all(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64]) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.all_to_all_under(tensors, send, recv, &mut || ())
    }
    /// `all_to_all`; `work` is called once, to give a GPU what it can do meanwhile, also while the host posts the transfer,
    /// which does not wait for that.
    #[track_caller]
    fn all_to_all_under(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64], work: Work) -> Result<Pending<Vec<Tensor>>, CommError>;
    /// Batched point-to-point: all sends and receives are posted together. Between two ranks the k-th send
    /// meets the k-th receive.
    #[track_caller]
    fn exchange(&self, sends: Vec<(usize, Tensor)>, recvs: Vec<(usize, TensorSpec)>) -> Result<Pending<Vec<Tensor>>, CommError>;
    /// As `exchange`, but all ranks of the group call it, with what meets, so that they can tell each other where things are
    /// to go: on GPUs a host waits here until the others' hosts have come (not their GPUs). What comes is in `places` after
    /// the wait, and nobody touches them before.
    #[track_caller]
    fn exchange_into(&self, sends: Vec<(usize, Tensor)>, places: Vec<(usize, Tensor)>) -> Result<Pending<()>, CommError> {
        let came = self.exchange(sends, specs(&places))?;
        Ok(came.map(move |came| {
            tch::no_grad(|| places.into_iter().zip(came).for_each(|((_, mut place), came)| place.copy_(&came)));
            Ok(())
        }))
    }
    /// A place for what others send in an `exchange_into`, not written yet: a tensor that comes and goes is best one of these
    /// (on GPUs, what peers have opened of torch's memory never comes back to the driver).
    fn room(&self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, CommError> {
        Ok(Tensor::empty(shape, (kind, device)))
    }
    /// Is an `exchange_into` of everyone with everyone as fast as an `all_gather`? Not between hosts, whose links it crosses
    /// once a rank.
    fn lands_in_place(&self) -> bool {
        true
    }
    /// GPU memory that this group keeps for transfers, beside torch's; the world's holds all groups' `room`, as far as used.
    fn buffer_bytes(&self) -> usize {
        0
    }
    /// The sub-group of ranks with the same colour, ordered by (key, rank). Collective over this group.
    #[track_caller]
    fn split(&self, colour: usize, key: usize) -> Result<Rc<dyn Communicator>, CommError>;
}

pub type Comm = Rc<dyn Communicator>;

/// What these places take.
fn specs(places: &[(usize, Tensor)]) -> Vec<(usize, TensorSpec)> {
    places.iter().map(|(peer, place)| (*peer, TensorSpec { shape: place.size(), kind: place.kind(), device: place.device() })).collect()
}

/// Every rank's bytes, in rank order (small control messages: JSON, hashes).
#[track_caller]
pub fn gather_bytes(comm: &dyn Communicator, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
    let lengths = comm.all_gather(vec![Tensor::from_slice(&[bytes.len() as i64])])?.wait()?;
    let lengths = Vec::<i64>::try_from(&lengths[0]).expect("i64 lengths");
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut padded = bytes.to_vec();
    padded.resize(longest.max(1) as usize, 0);
    let all = comm.all_gather(vec![Tensor::from_slice(&padded)])?.wait()?;
    let all = Vec::<u8>::try_from(&all[0]).expect("bytes");
    Ok(all.chunks(padded.len()).zip(&lengths).map(|(chunk, &n)| chunk[..n as usize].to_vec()).collect())
}

/// `gather_bytes` for `root` alone; the others get nothing.
#[track_caller]
pub fn gather_bytes_at(comm: &dyn Communicator, bytes: &[u8], root: usize) -> Result<Vec<Vec<u8>>, CommError> {
    let lengths = comm.all_gather(vec![Tensor::from_slice(&[bytes.len() as i64])])?.wait()?;
    if comm.rank() != root {
        comm.exchange(vec![(root, Tensor::from_slice(bytes))], Vec::new())?.wait()?;
        return Ok(Vec::new());
    }
    let lengths = Vec::<i64>::try_from(&lengths[0]).expect("i64 lengths");
    let spec = |length: i64| TensorSpec { shape: vec![length], kind: Kind::Uint8, device: Device::Cpu };
    let others = lengths.into_iter().enumerate().filter(|(rank, _)| *rank != root);
    let came = comm.exchange(Vec::new(), others.map(|(rank, length)| (rank, spec(length))).collect())?.wait()?;
    let mut all: Vec<Vec<u8>> = came.iter().map(|bytes| Vec::try_from(bytes).expect("bytes")).collect();
    all.insert(root, bytes.to_vec());
    Ok(all)
}

/// `root`'s bytes on every rank.
#[track_caller]
pub fn broadcast_bytes(comm: &dyn Communicator, bytes: &[u8], root: usize) -> Result<Vec<u8>, CommError> {
    let length = comm.broadcast(vec![Tensor::from_slice(&[bytes.len() as i64])], root)?.wait()?;
    let length = length[0].int64_value(&[0]) as usize;
    let mut buffer = if comm.rank() == root { bytes.to_vec() } else { vec![0; length] };
    buffer.resize(length.max(1), 0);
    let all = comm.broadcast(vec![Tensor::from_slice(&buffer)], root)?.wait()?;
    let mut all = Vec::<u8>::try_from(&all[0]).expect("bytes");
    all.truncate(length);
    Ok(all)
}

/// A collective that does nothing but wait for everyone.
#[track_caller]
pub fn barrier(comm: &dyn Communicator) -> Result<(), CommError> {
    comm.all_reduce(vec![Tensor::from_slice(&[0i64])], Reduce::Sum)?.wait().map(|_| ())
}
