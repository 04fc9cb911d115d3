//! The collectives, made of sends and receives on host memory.
//! Invariant: sums are scatter, add in rank order (`sum.rs`), gather; bit for bit what `local` gives. Each
//! collective has a tag of its own, so that transfers of one group may overlap and be waited for in any order.
//! GPU tensors are copied to the host before and back after (`to_host`, `Home`): enough for several ranks on one
//! GPU in a test. Pinned memory and a copy stream would go into those two places.

use super::progress::Step;
use super::{Batch, Link, byte_length};
use crate::comm::call;
use crate::comm::sum;
use crate::comm::{Comm, CommError, Communicator, Pending, Reduce, TensorSpec, Work};
use ::mpi::traits::Communicator as _;
use std::cell::Cell;
use std::ffi::c_int;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// Up to this many bytes everyone sends everything and sums for itself: one latency instead of two.
const SMALL_BYTES: usize = 16 << 10;
/// Up to so many bytes of each rank are passed on by others where ranks are many: these have them in memory twice.
const SMALL_GATHER_BYTES: usize = 256 << 10;
/// As many ranks as a host has GPUs are connected in pairs anyway.
const FEW: usize = 8;
/// Below MPI's guaranteed highest tag (32767), and apart from those of collectives.
const EXCHANGE_TAG: c_int = 32_000;
const NUM_TAGS: u32 = 15_000;

pub(super) struct MpiComm {
    link: Rc<Link>,
    rank: usize,
    size: usize,
    next_op: Cell<u32>,
}

/// Where results go back to.
#[derive(Clone, Copy)]
struct Home(Device);

impl Home {
    fn of(tensors: &[Tensor]) -> Self {
        Home(tensors.first().map_or(Device::Cpu, Tensor::device))
    }

    fn bring(self, tensors: Vec<Tensor>) -> Vec<Tensor> {
        if self.0 == Device::Cpu { tensors } else { tensors.into_iter().map(|t| t.to_device(self.0)).collect() }
    }
}

/// The tensors in contiguous host memory; no copy where they are there already.
fn to_host(tensors: Vec<Tensor>) -> Vec<Tensor> {
    tch::no_grad(|| tensors.into_iter().map(|t| t.detach().to_device(Device::Cpu).contiguous()).collect())
}

fn empty_host(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::empty(shape, (kind, Device::Cpu))
}

fn copy_into(target: Tensor, source: &Tensor) {
    let mut target = target;
    tch::no_grad(|| target.copy_(source));
}

/// First element and length of `rank`'s share of `length` elements.
fn share(length: i64, rank: usize, size: usize) -> (i64, i64) {
    let at = |r: usize| (length as i128 * r as i128 / size as i128) as i64;
    (at(rank), at(rank + 1) - at(rank))
}

impl MpiComm {
    pub(super) fn new(link: Rc<Link>) -> Self {
        let (rank, size) = (link.group.rank() as usize, link.group.size() as usize);
        MpiComm { link, rank, size, next_op: Cell::new(0) }
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    fn peers(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        // Each rank starts with its successor: no rank is everyone's first target.
        let (rank, size) = (self.rank, self.size);
        (1..size).map(move |step| (rank + step) % size)
    }

    fn next_tag(&self) -> c_int {
        let op = self.next_op.replace((self.next_op.get() + 1) % NUM_TAGS);
        2 * op as c_int
    }

    /// Runs `batch` and then `steps`; `results` are what the last of them leaves.
    fn fly(&self, batch: Batch, steps: Vec<Step>, finish: impl FnOnce() -> Vec<Tensor> + 'static) -> Pending<Vec<Tensor>> {
        let shared = self.link.shared.clone();
        let flight = shared.start(self.link.clone(), batch, steps);
        Pending::running(move || shared.wait(&flight).map(|()| finish()))
    }

    /// Sends a share of every flat tensor to each peer and receives theirs of this rank's share:
    /// `parts[i][p]` is rank p's contribution to this rank's share of tensor i.
    fn scatter(&self, batch: &mut Batch, flats: &[Tensor], tag: c_int) -> Result<Vec<Vec<Tensor>>, CommError> {
        let mut parts = Vec::with_capacity(flats.len());
        for flat in flats {
            let length = flat.numel() as i64;
            let (start, mine) = share(length, self.rank, self.size);
            let part = |p: usize| if p == self.rank { flat.narrow(0, start, mine) } else { empty_host(&[mine], flat.kind()) };
            let of_tensor: Vec<Tensor> = (0..self.size).map(part).collect();
            for peer in self.peers() {
                self.link.receive(batch, of_tensor[peer].shallow_clone(), peer, tag)?;
                let (start, theirs) = share(length, peer, self.size);
                self.link.send(batch, flat.narrow(0, start, theirs), peer, tag)?;
            }
            parts.push(of_tensor);
        }
        Ok(parts)
    }

    /// All-reduce of few bytes: everyone gets everything and folds it alone.
    fn small_all_reduce(&self, tensors: Vec<Tensor>, reduce: Reduce, home: Home) -> Result<Pending<Vec<Tensor>>, CommError> {
        let packed = Packed::places(&tensors);
        let (batch, steps, blocks) = self.gather_blocks(packed.pack(&tensors))?;
        Ok(self.fly(batch, steps, move || {
            let blocks = blocks();
            let sum = |(i, tensor): (usize, &Tensor)| sum::fold_rows(&packed.part(&blocks, i, tensor.kind()), reduce).view(&tensor.size()[..]);
            home.bring(tensors.iter().enumerate().map(sum).collect())
        }))
    }

    /// All-gather of few bytes, packed in one message.
    fn small_all_gather(&self, tensors: Vec<Tensor>, home: Home) -> Result<Pending<Vec<Tensor>>, CommError> {
        let packed = Packed::places(&tensors);
        let (batch, steps, blocks) = self.gather_blocks(packed.pack(&tensors))?;
        Ok(self.fly(batch, steps, move || {
            let blocks = blocks();
            let all = tensors.iter().enumerate().map(|(i, tensor)| {
                let mut shape = tensor.size();
                shape[0] *= blocks.size()[0];
                packed.part(&blocks, i, tensor.kind()).view(&shape[..])
            });
            home.bring(all.collect())
        }))
    }

    /// Everyone's block of bytes, all as long: rows by rank, to be asked for once the batch and the steps are done. Few ranks send to each other in
    /// one latency. Many would need a connection a pair: theirs go in ⌈log₂ N⌉ rounds, in the k-th of which a rank passes the
    /// 2ᵏ blocks that it has on to the rank 2ᵏ before it (Bruck et al. 1997).
    fn gather_blocks(&self, mine: Tensor) -> Result<(Batch, Vec<Step>, impl FnOnce() -> Tensor + use<>), CommError> {
        let (rank, size, bytes) = (self.rank, self.size, mine.numel() as i64);
        let (tag, mut batch, mut steps) = (self.next_tag(), Batch::default(), Vec::new());
        // Its own first, then its successors': so that what is passed on lies together.
        let all = empty_host(&[size as i64 * bytes], Kind::Uint8);
        let blocks = move |all: &Tensor, first: usize, count: usize| all.narrow(0, first as i64 * bytes, count as i64 * bytes);
        copy_into(blocks(&all, 0, 1), &mine);
        if size <= FEW {
            for peer in self.peers() {
                self.link.receive(&mut batch, blocks(&all, (peer + size - rank) % size, 1), peer, tag)?;
                self.link.send(&mut batch, blocks(&all, 0, 1), peer, tag)?;
            }
        } else {
            for distance in std::iter::successors(Some(1), |d| Some(2 * d)).take_while(|&d| d < size) {
                let (link, all, count) = (self.link.clone(), all.shallow_clone(), distance.min(size - distance));
                steps.push(Box::new(move || {
                    let mut batch = Batch::default();
                    link.receive(&mut batch, blocks(&all, distance, count), (rank + distance) % size, tag)?;
                    link.send(&mut batch, blocks(&all, 0, count), (rank + size - distance) % size, tag)?;
                    Ok(batch)
                }) as Step);
            }
        }
        let first = size - rank; // where rank 0's lies
        let by_rank = move || Tensor::cat(&[blocks(&all, first, rank), blocks(&all, 0, first)], 0).view([size as i64, bytes]);
        Ok((batch, steps, by_rank))
    }
}

/// Where tensors lie one behind the other in a block of bytes: first byte and length of each. First bytes are multiples of 8,
/// so that every kind may be viewed there.
struct Packed(Vec<(i64, i64)>);

impl Packed {
    fn places(tensors: &[Tensor]) -> Self {
        let place = |next: &mut i64, tensor: &Tensor| {
            let bytes = byte_length(tensor) as i64;
            *next += (bytes + 7) / 8 * 8;
            Some((*next - (bytes + 7) / 8 * 8, bytes))
        };
        Packed(tensors.iter().scan(0, place).collect())
    }

    fn pack(&self, tensors: &[Tensor]) -> Tensor {
        let block = Tensor::zeros([self.0.iter().map(|(_, bytes)| (bytes + 7) / 8 * 8).sum::<i64>()], (Kind::Uint8, Device::Cpu));
        for (&(at, bytes), tensor) in self.0.iter().zip(tensors) {
            copy_into(block.narrow(0, at, bytes).view_dtype(tensor.kind()), &tensor.view([-1]));
        }
        block
    }

    /// The i-th tensor's elements in blocks [ranks, bytes]: [ranks, elements].
    fn part(&self, blocks: &Tensor, i: usize, kind: Kind) -> Tensor {
        let (at, bytes) = self.0[i];
        let part = blocks.narrow(1, at, bytes).reshape([-1]); // a row's bytes may be no multiple of an element's, where there are none
        part.view_dtype(kind).view([blocks.size()[0], bytes / kind.elt_size_in_bytes() as i64])
    }
}

impl Communicator for MpiComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, tensors: Vec<Tensor>, reduce: Reduce) -> Result<Pending<Vec<Tensor>>, CommError> {
        sum::check_reducible("all_reduce", &tensors, reduce)?;
        if self.size == 1 {
            return Ok(Pending::ready(tensors));
        }
        let home = Home::of(&tensors);
        let tensors = to_host(tensors);
        if tensors.iter().map(byte_length).sum::<usize>() <= SMALL_BYTES {
            return self.small_all_reduce(tensors, reduce, home);
        }
        let (tag, mut batch) = (self.next_tag(), Batch::default());
        let flats: Vec<Tensor> = tensors.iter().map(|t| t.view([-1])).collect();
        let outs: Vec<Tensor> = tensors.iter().map(|t| empty_host(&t.size(), t.kind())).collect();
        let out_flats: Vec<Tensor> = outs.iter().map(|t| t.view([-1])).collect();
        let parts = self.scatter(&mut batch, &flats, tag)?;
        let (link, rank, size, peers) = (self.link.clone(), self.rank, self.size, self.peers());
        let add_and_gather: Step = Box::new(move || {
            let mut batch = Batch::default();
            let piece = |out: &Tensor, of: usize| {
                let (start, length) = share(out.numel() as i64, of, size);
                out.narrow(0, start, length)
            };
            for peer in peers.clone() {
                for out in &out_flats {
                    link.receive(&mut batch, piece(out, peer), peer, tag + 1)?;
                }
            }
            for (out, parts) in out_flats.iter().zip(&parts) {
                sum::fold(&piece(out, rank), parts, reduce);
                for peer in peers.clone() {
                    link.send(&mut batch, piece(out, rank), peer, tag + 1)?;
                }
            }
            Ok(batch)
        });
        Ok(self.fly(batch, vec![add_and_gather], move || home.bring(outs)))
    }

    fn reduce_scatter(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "reduce_scatter";
        sum::check_reducible(OP, &tensors, Reduce::Sum)?;
        call::check_rows(OP, &tensors, self.size)?;
        if self.size == 1 {
            return Ok(Pending::ready(tensors));
        }
        let home = Home::of(&tensors);
        let tensors = to_host(tensors);
        let mut batch = Batch::default();
        let flats: Vec<Tensor> = tensors.iter().map(|t| t.view([-1])).collect();
        // Dim 0 divides by the ranks, so the share of the flat tensor is the piece of rows.
        let parts = self.scatter(&mut batch, &flats, self.next_tag())?;
        let size = self.size as i64;
        Ok(self.fly(batch, Vec::new(), move || {
            let sums = tensors.iter().zip(parts).map(|(tensor, parts)| {
                let mut shape = tensor.size();
                shape[0] /= size;
                let out = empty_host(&shape, tensor.kind());
                sum::fold(&out.view([-1]), &parts, Reduce::Sum);
                out
            });
            home.bring(sums.collect())
        }))
    }

    fn all_gather(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        call::check_rows("all_gather", &tensors, 1)?;
        if self.size == 1 {
            return Ok(Pending::ready(tensors));
        }
        let home = Home::of(&tensors);
        let tensors = to_host(tensors);
        if self.size > FEW && tensors.iter().map(byte_length).sum::<usize>() <= SMALL_GATHER_BYTES {
            return self.small_all_gather(tensors, home);
        }
        let (tag, mut batch) = (self.next_tag(), Batch::default());
        let mut outs = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let mut shape = tensor.size();
            let rows = shape[0];
            shape[0] *= self.size as i64;
            let out = empty_host(&shape, tensor.kind());
            copy_into(out.narrow(0, self.rank as i64 * rows, rows), &tensor);
            for peer in self.peers() {
                self.link.receive(&mut batch, out.narrow(0, peer as i64 * rows, rows), peer, tag)?;
                self.link.send(&mut batch, tensor.shallow_clone(), peer, tag)?;
            }
            outs.push(out);
        }
        Ok(self.fly(batch, Vec::new(), move || home.bring(outs)))
    }

    /// Along a binomial tree: ⌈log₂ N⌉ latencies, and the root sends that many copies instead of N − 1.
    fn broadcast(&self, tensors: Vec<Tensor>, root: usize) -> Result<Pending<Vec<Tensor>>, CommError> {
        call::check_peer("broadcast", root, self.size)?;
        if self.size == 1 {
            return Ok(Pending::ready(tensors));
        }
        let home = Home::of(&tensors);
        let (tag, mut batch) = (self.next_tag(), Batch::default());
        let place = (self.rank + self.size - root) % self.size;
        let actual = |place: usize| (place + root) % self.size;
        // A place's parent is itself without its lowest set bit; its children set one bit below that.
        let lowest = if place == 0 { self.size.next_power_of_two() } else { 1 << place.trailing_zeros() };
        let offsets = std::iter::successors(Some(lowest / 2), |bit| Some(bit / 2)).take_while(|&bit| bit > 0);
        let children: Vec<usize> = offsets.map(|bit| place + bit).filter(|&p| p < self.size).map(actual).collect();
        let outs = if place == 0 { to_host(tensors) } else { tensors.iter().map(|t| empty_host(&t.size(), t.kind())).collect() };
        if place != 0 {
            for out in &outs {
                self.link.receive(&mut batch, out.shallow_clone(), actual(place - lowest), tag)?;
            }
        }
        let (link, passed_on) = (self.link.clone(), outs.iter().map(Tensor::shallow_clone).collect::<Vec<_>>());
        let pass_on: Step = Box::new(move || {
            let mut batch = Batch::default();
            for child in children {
                for out in &passed_on {
                    link.send(&mut batch, out.shallow_clone(), child, tag)?;
                }
            }
            Ok(batch)
        });
        Ok(self.fly(batch, vec![pass_on], move || home.bring(outs)))
    }

    fn lands_in_place(&self) -> bool {
        false
    }

    fn exchange_counts(&self, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError> {
        call::exchange_counts(self, counts)
    }

    fn all_to_all_under(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64], work: Work) -> Result<Pending<Vec<Tensor>>, CommError> {
        call::check_all_to_all(&tensors, send, recv, self.size)?;
        if self.size == 1 && send == recv {
            work();
            return Ok(Pending::ready(tensors));
        }
        if send[self.rank] != recv[self.rank] {
            let (mine, theirs) = (format!("all_to_all receiving {recv:?}"), format!("all_to_all sending {send:?}"));
            return Err(CommError::Disagree { rank: self.rank, peer: self.rank, mine, theirs });
        }
        let home = Home::of(&tensors);
        let (tag, mut batch) = (self.next_tag(), Batch::default());
        let (send_at, recv_at) = (call::offsets(send), call::offsets(recv));
        let mut outs = Vec::with_capacity(tensors.len());
        for tensor in to_host(tensors) {
            let mut shape = tensor.size();
            shape[0] = recv.iter().sum();
            let out = empty_host(&shape, tensor.kind());
            let (sent, received) = (|p: usize| tensor.narrow(0, send_at[p], send[p]), |p: usize| out.narrow(0, recv_at[p], recv[p]));
            copy_into(received(self.rank), &sent(self.rank));
            for peer in self.peers() {
                self.link.receive(&mut batch, received(peer), peer, tag)?;
                self.link.send(&mut batch, sent(peer), peer, tag)?;
            }
            outs.push(out);
        }
        let flying = self.fly(batch, Vec::new(), move || home.bring(outs));
        work();
        Ok(flying)
    }

    fn exchange(&self, sends: Vec<(usize, Tensor)>, recvs: Vec<(usize, TensorSpec)>) -> Result<Pending<Vec<Tensor>>, CommError> {
        let mut batch = Batch::default();
        let mut outs = Vec::with_capacity(recvs.len());
        // One tag for all: MPI keeps the order between two ranks, so the k-th send meets the k-th receive.
        for (from, spec) in &recvs {
            call::check_peer("exchange", *from, self.size)?;
            let out = empty_host(&spec.shape, spec.kind);
            self.link.receive(&mut batch, out.shallow_clone(), *from, EXCHANGE_TAG)?;
            outs.push(out);
        }
        for (to, tensor) in sends {
            call::check_peer("exchange", to, self.size)?;
            let tensor = to_host(vec![tensor]).remove(0);
            self.link.send(&mut batch, tensor, to, EXCHANGE_TAG)?;
        }
        Ok(self.fly(batch, Vec::new(), move || outs.into_iter().zip(recvs).map(|(out, (_, spec))| out.to_device(spec.device)).collect()))
    }

    fn split(&self, colour: usize, key: usize) -> Result<Comm, CommError> {
        Ok(Rc::new(MpiComm::new(Rc::new(self.link.split(colour, key)))))
    }
}
