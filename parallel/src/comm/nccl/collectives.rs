//! The collectives on GPU tensors. Whatever lies in host memory goes over the control communicator (MPI).
//! Invariant: sums are scatter, add in rank order on the GPU (torch, null stream), gather, as in the other back
//! ends; `native_sums` gives that up for NCCL's own. The additions of `reduce_scatter` are enqueued at its wait;
//! those of `all_reduce` at once, because what follows them uses the axis' stream again and all ranks must use
//! it in one order.

use super::{Axis, Memory, Move};
use crate::comm::call;
use crate::comm::local::solo;
use crate::comm::sum;
use crate::comm::{Comm, CommError, Communicator, Pending, Reduce, TensorSpec, Work};
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

pub(super) struct NcclComm {
    axis: Rc<Axis>,
    /// Not split from another.
    first: bool,
    rank: usize,
    size: usize,
}

/// Where a call's tensors are: all on the host, or all on a GPU.
fn on_host(op: &'static str, devices: impl Iterator<Item = Device>) -> Result<bool, CommError> {
    let devices: Vec<Device> = devices.collect();
    let num_host = devices.iter().filter(|&&d| d == Device::Cpu).count();
    match num_host {
        0 if !devices.is_empty() => Ok(false),
        n if n == devices.len() => Ok(true),
        n => Err(CommError::Unsupported { op, reason: format!("{n} of {} tensors are on the host, the others on a GPU", devices.len()) }),
    }
}

fn all_on_host(op: &'static str, tensors: &[Tensor]) -> Result<bool, CommError> {
    on_host(op, tensors.iter().map(Tensor::device))
}

fn contiguous(tensors: Vec<Tensor>) -> Vec<Tensor> {
    tch::no_grad(|| tensors.into_iter().map(|t| t.detach().contiguous()).collect())
}

/// First element and length of `rank`'s share of `length` elements.
fn share(length: i64, rank: usize, size: usize) -> (i64, i64) {
    let at = |r: usize| (length as i128 * r as i128 / size as i128) as i64;
    (at(rank), at(rank + 1) - at(rank))
}

impl NcclComm {
    pub(super) fn new(axis: Axis, first: bool) -> Self {
        let (rank, size) = (axis.control.rank(), axis.control.size());
        NcclComm { axis: Rc::new(axis), first, rank, size }
    }

    /// The transfers on the stream so far, as something to wait on. `kept` are the tensors they touch.
    fn pending(&self, op: &'static str, kept: Vec<Tensor>, finish: impl FnOnce() -> Vec<Tensor> + 'static) -> Result<Pending<Vec<Tensor>>, CommError> {
        let (axis, mark) = (self.axis.clone(), self.axis.mark(op)?);
        Ok(Pending::running(move || {
            axis.join(&mark, op)?;
            // Torch may hand this memory out again: whoever gets it comes after the join.
            drop(kept);
            Ok(finish())
        }))
    }

    /// A place for each of `tensors` as it is here, or of the shape that `shape` makes of its.
    fn rooms(&self, op: &'static str, tensors: &[Tensor], shape: impl Fn(&mut Vec<i64>)) -> Result<Vec<Tensor>, CommError> {
        let room = |tensor: &Tensor| {
            let mut size = tensor.size();
            shape(&mut size);
            self.axis.room(op, &size, tensor.kind())
        };
        tensors.iter().map(room).collect()
    }

    /// Sends each rank its share of the flat tensors: `[i][p]` is rank p's part of this rank's share of tensor i.
    fn scatter(&self, op: &'static str, flats: &[Tensor]) -> Result<Vec<Vec<Tensor>>, CommError> {
        let parts = flats.iter().map(|flat| {
            let (start, mine) = share(flat.numel() as i64, self.rank, self.size);
            let part = |p| if p == self.rank { Ok(flat.narrow(0, start, mine)) } else { self.axis.room(op, &[mine], flat.kind()) };
            (0..self.size).map(part).collect()
        });
        let parts: Vec<Vec<Tensor>> = parts.collect::<Result<_, CommError>>()?;
        // After the allocations: their memory may still be in use by earlier work of the null stream.
        self.axis.fork(op)?;
        let mut shares = Vec::new();
        for (flat, of_tensor) in flats.iter().zip(&parts) {
            for peer in self.others() {
                let (start, theirs) = share(flat.numel() as i64, peer, self.size);
                shares.push((flat.narrow(0, start, theirs), &of_tensor[peer], peer));
            }
        }
        let moves: Vec<Move> = shares.iter().flat_map(|(out, part, peer)| [Move::Send(self.axis.memory(out), *peer), Move::Receive(self.axis.memory(part), *peer)]).collect();
        self.axis.post(op, &moves, true)?;
        Ok(parts)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank, self.size);
        (0..size).filter(move |&peer| peer != rank)
    }

    /// Sum in rank order: everything is enqueued here, torch's stream waits in between, the host never.
    fn ordered_all_reduce(&self, tensors: Vec<Tensor>, reduce: Reduce) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "all_reduce";
        let flats: Vec<Tensor> = tensors.iter().map(|t| t.view([-1])).collect();
        let outs = self.rooms(OP, &tensors, |_| ())?;
        let parts = self.scatter(OP, &flats)?;
        self.axis.join(&self.axis.mark(OP)?, OP)?;
        let piece = |out: &Tensor, of: usize| {
            let flat = out.view([-1]);
            let (start, length) = share(flat.numel() as i64, of, self.size);
            flat.narrow(0, start, length)
        };
        for (out, parts) in outs.iter().zip(&parts) {
            sum::fold(&piece(out, self.rank), parts, reduce);
        }
        self.axis.fork(OP)?;
        let mut pieces = Vec::new();
        for out in &outs {
            for peer in self.others() {
                pieces.push((piece(out, self.rank), piece(out, peer), peer));
            }
        }
        let moves: Vec<Move> = pieces.iter().flat_map(|(mine, theirs, peer)| [Move::Send(self.axis.memory(mine), *peer), Move::Receive(self.axis.memory(theirs), *peer)]).collect();
        self.axis.post(OP, &moves, true)?;
        self.pending(OP, flats, move || outs)
    }

    /// What is sent, which lives until the wait. `in_step`: as `Axis::post`.
    fn exchanged(&self, sends: Vec<(usize, Tensor)>, places: &[(usize, Tensor)], in_step: bool) -> Result<Vec<Tensor>, CommError> {
        const OP: &str = "exchange";
        for (peer, _) in sends.iter().chain(places) {
            call::check_peer(OP, *peer, self.size)?;
        }
        let (peers, tensors): (Vec<usize>, Vec<Tensor>) = sends.into_iter().unzip();
        let tensors = contiguous(tensors);
        self.axis.fork(OP)?;
        let mut moves: Vec<Move> = tensors.iter().zip(&peers).map(|(tensor, &peer)| Move::Send(self.axis.memory(tensor), peer)).collect();
        moves.extend(places.iter().map(|(peer, place)| Move::Receive(self.axis.memory(place), *peer)));
        moves.retain(|one| one.peer() != self.rank);
        self.axis.post(OP, &moves, in_step)?;
        // To itself: the k-th of what is sent is the k-th of what comes.
        let from_self = places.iter().filter(|(peer, _)| *peer == self.rank).map(|(_, place)| place);
        let to_self = tensors.iter().zip(&peers).filter(|(_, peer)| **peer == self.rank).map(|(tensor, _)| tensor);
        to_self.zip(from_self).try_for_each(|(tensor, place)| self.axis.copy(OP, self.axis.memory(tensor), self.axis.memory(place)))?;
        Ok(tensors)
    }
}

impl Communicator for NcclComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, tensors: Vec<Tensor>, reduce: Reduce) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "all_reduce";
        if all_on_host(OP, &tensors)? {
            return self.axis.control.all_reduce(tensors, reduce);
        }
        sum::check_reducible(OP, &tensors, reduce)?;
        let tensors = contiguous(tensors);
        let Some(nccl) = self.axis.native_sums() else { return self.ordered_all_reduce(tensors, reduce) };
        let outs = self.rooms(OP, &tensors, |_| ())?;
        self.axis.fork(OP)?;
        for (tensor, out) in tensors.iter().zip(&outs) {
            self.axis.native_all_reduce(nccl, tensor, out, reduce)?;
        }
        self.pending(OP, tensors, move || outs)
    }

    fn reduce_scatter(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "reduce_scatter";
        if all_on_host(OP, &tensors)? {
            return self.axis.control.reduce_scatter(tensors);
        }
        sum::check_reducible(OP, &tensors, Reduce::Sum)?;
        call::check_rows(OP, &tensors, self.size)?;
        let tensors = contiguous(tensors);
        let outs = self.rooms(OP, &tensors, |shape| shape[0] /= self.size as i64)?;
        if let Some(nccl) = self.axis.native_sums() {
            self.axis.fork(OP)?;
            for (tensor, out) in tensors.iter().zip(&outs) {
                self.axis.native_reduce_scatter(nccl, tensor, out)?;
            }
            return self.pending(OP, tensors, move || outs);
        }
        let flats: Vec<Tensor> = tensors.iter().map(|t| t.view([-1])).collect();
        let parts = self.scatter(OP, &flats)?;
        self.pending(OP, flats, move || {
            for (out, parts) in outs.iter().zip(&parts) {
                sum::fold(&out.view([-1]), parts, Reduce::Sum);
            }
            outs
        })
    }

    fn all_gather(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "all_gather";
        if all_on_host(OP, &tensors)? {
            return self.axis.control.all_gather(tensors);
        }
        call::check_rows(OP, &tensors, 1)?;
        let tensors = contiguous(tensors);
        let outs = self.rooms(OP, &tensors, |shape| shape[0] *= self.size as i64)?;
        if let Some(nccl) = &self.axis.nccl {
            self.axis.fork(OP)?;
            tensors.iter().zip(&outs).try_for_each(|(tensor, out)| self.axis.native_all_gather(nccl, tensor, out))?;
            return self.pending(OP, tensors, move || outs);
        }
        let place = |out: &Tensor, rows: i64, rank: usize| out.narrow(0, rank as i64 * rows, rows);
        let mut pieces = Vec::new();
        for (tensor, out) in tensors.iter().zip(&outs) {
            let rows = tensor.size()[0];
            tch::no_grad(|| place(out, rows, self.rank).copy_(tensor));
            pieces.extend(self.others().map(|peer| (tensor, place(out, rows, peer), peer)));
        }
        self.axis.fork(OP)?;
        let moves: Vec<Move> = pieces.iter().flat_map(|(mine, theirs, peer)| [Move::Send(self.axis.memory(mine), *peer), Move::Receive(self.axis.memory(theirs), *peer)]).collect();
        self.axis.post(OP, &moves, true)?;
        self.pending(OP, tensors, move || outs)
    }

    fn broadcast(&self, tensors: Vec<Tensor>, root: usize) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "broadcast";
        call::check_peer(OP, root, self.size)?;
        if all_on_host(OP, &tensors)? {
            return self.axis.control.broadcast(tensors, root);
        }
        let outs = if self.rank == root { contiguous(tensors) } else { self.rooms(OP, &tensors, |_| ())? };
        self.axis.fork(OP)?;
        if let Some(nccl) = &self.axis.nccl {
            outs.iter().try_for_each(|out| self.axis.native_broadcast(nccl, out, root))?;
            return self.pending(OP, Vec::new(), move || outs);
        }
        let to_all = |out| self.others().map(move |peer| Move::Send(self.axis.memory(out), peer));
        let moves: Vec<Move> = match self.rank == root {
            true => outs.iter().flat_map(to_all).collect(),
            false => outs.iter().map(|out| Move::Receive(self.axis.memory(out), root)).collect(),
        };
        self.axis.post(OP, &moves, true)?;
        self.pending(OP, Vec::new(), move || outs)
    }

    /// Over MPI: the host needs them, and for a few bytes it is faster than NCCL.
    fn exchange_counts(&self, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError> {
        self.axis.control.exchange_counts(counts)
    }

    fn all_to_all_under(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64], work: Work) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "all_to_all";
        if all_on_host(OP, &tensors)? {
            return self.axis.control.all_to_all_under(tensors, send, recv, work);
        }
        call::check_all_to_all(&tensors, send, recv, self.size)?;
        if send[self.rank] != recv[self.rank] {
            let (mine, theirs) = (format!("all_to_all receiving {recv:?}"), format!("all_to_all sending {send:?}"));
            return Err(CommError::Disagree { rank: self.rank, peer: self.rank, mine, theirs });
        }
        let tensors = contiguous(tensors);
        let (send_at, recv_at) = (call::offsets(send), call::offsets(recv));
        let (outs, mut pieces) = (self.rooms(OP, &tensors, |shape| shape[0] = recv.iter().sum())?, Vec::new());
        for (tensor, out) in tensors.iter().zip(&outs) {
            let row = tensor.size()[1..].iter().product::<i64>() as usize * tensor.kind().elt_size_in_bytes();
            let rows = |(at, _): Memory, first: i64, count: i64| (at.wrapping_byte_add(first as usize * row), count as usize * row);
            let (from, to) = (self.axis.memory(tensor), self.axis.memory(out));
            pieces.extend((0..self.size).map(|p| (rows(from, send_at[p], send[p]), rows(to, recv_at[p], recv[p]), p)));
        }
        self.axis.fork(OP)?;
        work();
        let others = pieces.iter().filter(|(.., peer)| *peer != self.rank);
        let moves: Vec<Move> = others.flat_map(|&(from, to, peer)| [Move::Send(from, peer), Move::Receive(to, peer)]).collect();
        self.axis.post(OP, &moves, true)?;
        let mut own = pieces.iter().filter(|(.., peer)| *peer == self.rank);
        own.try_for_each(|&(from, to, _)| self.axis.copy(OP, from, to))?;
        self.pending(OP, tensors, move || outs)
    }

    fn exchange(&self, sends: Vec<(usize, Tensor)>, recvs: Vec<(usize, TensorSpec)>) -> Result<Pending<Vec<Tensor>>, CommError> {
        const OP: &str = "exchange";
        if on_host(OP, sends.iter().map(|s| s.1.device()).chain(recvs.iter().map(|r| r.1.device)))? {
            return self.axis.control.exchange(sends, recvs);
        }
        let empty = |(peer, spec): (usize, TensorSpec)| (peer, Tensor::empty(&spec.shape[..], (spec.kind, spec.device)));
        let places: Vec<_> = recvs.into_iter().map(empty).collect();
        let outs = places.iter().map(|(_, place)| place.shallow_clone()).collect();
        // The peer may post what meets these in other calls.
        let sent = self.exchanged(sends, &places, false)?;
        self.pending(OP, sent, move || outs)
    }

    fn exchange_into(&self, sends: Vec<(usize, Tensor)>, places: Vec<(usize, Tensor)>) -> Result<Pending<()>, CommError> {
        const OP: &str = "exchange_into";
        if on_host(OP, sends.iter().chain(&places).map(|(_, tensor)| tensor.device()))? {
            return self.axis.control.exchange_into(sends, places);
        }
        let mut kept = self.exchanged(sends, &places, true)?;
        kept.extend(places.into_iter().map(|(_, place)| place));
        Ok(self.pending(OP, kept, Vec::new)?.map(|_| Ok(())))
    }

    fn room(&self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, CommError> {
        match device {
            Device::Cuda(_) => self.axis.room("room", shape, kind),
            _ => Ok(Tensor::empty(shape, (kind, device))),
        }
    }

    fn lands_in_place(&self) -> bool {
        !self.axis.any_far
    }

    fn split(&self, colour: usize, key: usize) -> Result<Comm, CommError> {
        let axis = &self.axis;
        let control = axis.control.split(colour, key)?;
        if control.size() == 1 {
            return Ok(solo());
        }
        // Streams of its own: transfers of different axes may be under way at once.
        Ok(Rc::new(NcclComm::new(Axis::new(control, axis.library.clone(), (axis.context.clone(), axis.arena.clone()), &axis.options)?, false)))
    }

    fn buffer_bytes(&self) -> usize {
        self.axis.peers.as_ref().map_or(0, |peers| peers.bytes) + if self.first { self.axis.arena.bytes() } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_all_host_or_all_gpu() {
        let (host, gpu) = (Device::Cpu, Device::Cuda(0));
        assert!(on_host("op", [host, host].into_iter()).unwrap());
        assert!(on_host("op", [].into_iter()).unwrap());
        assert!(!on_host("op", [gpu, gpu].into_iter()).unwrap());
        assert!(on_host("op", [gpu, host].into_iter()).is_err());
    }

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        let options = super::super::Options { library: Some("/nowhere/libnccl.so.2".into()), ..Default::default() };
        let error = super::super::connect(crate::comm::local::solo(), &options).err().expect("no library there");
        assert!(error.to_string().contains("/nowhere/libnccl.so.2"), "{error}");
    }
}
