//! GPUs of one host that reach each other's memory: what moves between two of them goes by copy engine (CUDA IPC),
//! announced by a flag. No multiprocessor takes part, the streams wait. Where all ranks of a group post at the same place
//! of their programs it goes straight to its place (`peer/direct.rs`). Else, as in a pipeline, the sender cannot ask for
//! it: then it goes through slots in the receiver's memory, each freed by a credit back, and no host waits at all. Part
//! of the NCCL back end (`nccl.rs`), which orders these streams against torch.
//!
//! A message goes in pieces of at most a slot. The k-th piece between two ranks uses slot k mod SLOTS: it is written once
//! the receiver has taken piece k − SLOTS out, and the slot's flag says k when all of it is there. Pieces go two ways in
//! turns: while one waits or raises its flag, the other's bytes are on the link.
//!
//! Invariants: what is sent and received waits in streams of its own, so that a rank which sends much can never keep
//! itself from receiving; the k-th message to a rank meets its k-th receive, of as many bytes; the slots are never freed,
//! because a peer may still write. A stream that waits for a dead peer waits for ever: the launcher's heartbeat ends
//! the process. CUDA knows nothing of the order that flags impose: the streams need hardware queues of their own
//! (`kernels::device::many_queues`), and nothing is loaded or allocated between a flag and its wait.
#![allow(unsafe_code)]

mod arena;
mod direct;

use super::{Comm, CommError, Communicator, gather_bytes};
use cudarc::driver::sys::{self, CUdeviceptr, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError};
use std::cell::Cell;
use std::ffi::{CString, c_char};
use std::sync::Arc;

pub use arena::Arena;
pub use direct::Parts;

/// How slots are laid out; the same on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Pieces under way to a rank at a time: a power of two, from WAYS and below MOST.
    pub count: usize,
    pub bytes: usize,
}

impl Slots {
    /// A piece costs the host some 10 µs, and is taken out while the next ones come: 8 MiB (22 µs of NVLink) are a middle.
    /// Not more than 256 MiB an axis, of up to 33 ranks that reach each other.
    pub fn of(ranks: usize) -> Self {
        let bytes = (64 << 20) / ranks.saturating_sub(1).max(1);
        Slots { count: 4, bytes: (bytes / PAGE_BYTES * PAGE_BYTES).clamp(2 << 20, 8 << 20) }
    }
}

/// Streams in each direction.
pub const WAYS: usize = 2;
/// Behind the slots lie a flag and a credit for each, 128 bytes apart, and those of the direct way.
const PAGE_BYTES: usize = 4096;
const LINE: usize = 128;
const MOST: usize = PAGE_BYTES / (2 * LINE);
/// Where a part of a message starts in a slot: copy engines are slow at odd places.
const ALIGN: usize = 256;

/// The ranks of a group that this one reaches in memory.
pub(super) struct Peers {
    links: Vec<Option<Link>>,
    /// Where sends wait for credit, and receives for data: WAYS each, or none where nobody is reached. Streams that wait need
    /// hardware queues of their own, and a GPU has 32 for all axes.
    out: Vec<Arc<CudaStream>>,
    into: Vec<Arc<CudaStream>>,
    slots: Slots,
    /// Device memory of the slots.
    pub bytes: usize,
    /// Pairs of ranks on one node that do not reach each other.
    pub refused: usize,
    rank: usize,
    /// The ranks over MPI, for where things are to go alone.
    control: Comm,
    exports: direct::Exports,
}

/// To and from one rank. Addresses are of slots, then of their flags and credits.
struct Link {
    /// In this GPU's memory; the peer writes.
    mine: CUdeviceptr,
    /// In the peer's, mapped here.
    theirs: CUdeviceptr,
    sent: Cell<u32>,
    received: Cell<u32>,
    direct: direct::Direct,
}

/// What a rank tells the others of its group.
struct Card {
    node: u64,
    bus: [u8; 16],
}

impl Peers {
    /// Collective over `control`. `nodes`: as `nccl::Options::node`. Ranks on another node, or whose memory this GPU
    /// cannot reach, are left to NCCL; both sides of a pair see it alike.
    pub fn connect(control: &dyn Communicator, context: &Arc<CudaContext>, node: usize, slots: Option<Slots>) -> Result<Peers, CommError> {
        const OP: &str = "connect";
        let slots = slots.unwrap_or(Slots::of(control.size()));
        assert!(slots.count.is_power_of_two() && (WAYS..MOST).contains(&slots.count) && slots.bytes.is_multiple_of(ALIGN), "{slots:?}");
        let failed = |e: DriverError| CommError::Lost { rank: control.rank(), size: control.size(), op: OP, reason: format!("CUDA: {e:?}") };
        let (rank, size) = (control.rank(), control.size());
        context.bind_to_thread().map_err(failed)?;
        let card = Card::of(context, node).map_err(failed)?;
        let cards: Vec<Card> = gather_bytes(control, &card.bytes())?.iter().map(|bytes| Card::read(bytes)).collect();
        let reached: Vec<u8> = (0..size).map(|peer| (peer != rank && card.reaches(context, &cards[peer])) as u8).collect();
        let reached = gather_bytes(control, &reached)?;
        let near = |a: usize, b: usize| reached[a][b] == 1 && reached[b][a] == 1;
        let pairs = (0..size).flat_map(|b| (0..b).map(move |a| (a, b)));
        let refused = pairs.filter(|&(a, b)| cards[a].node == cards[b].node && !near(a, b)).count();
        // A region for each rank that is reached, in their order.
        let each = slots.count * slots.bytes + PAGE_BYTES;
        let before = |of: usize, writer: usize| (0..writer).filter(|&other| near(of, other)).count() * each;
        let bytes = before(rank, size);
        let (base, handle) = region(bytes).map_err(failed)?;
        let handles = gather_bytes(control, &handle)?;
        let mut links = Vec::new();
        for (peer, handle) in handles.into_iter().enumerate() {
            if !near(rank, peer) {
                links.push(None);
                continue;
            }
            let theirs = open(handle.try_into().expect("64 bytes")).map_err(failed)?;
            let (mine, theirs) = (base + before(rank, peer) as u64, theirs + before(peer, rank) as u64);
            links.push(Some(Link { mine, theirs, sent: Cell::new(0), received: Cell::new(0), direct: Default::default() }));
        }
        let ways = if links.iter().any(Option::is_some) { WAYS } else { 0 };
        let streams = || (0..ways).map(|_| context.new_stream()).collect::<Result<Vec<_>, _>>().map_err(failed);
        let (out, into) = (streams()?, streams()?);
        let own = control.split(0, rank)?;
        Ok(Peers { links, out, into, slots, bytes, refused, rank, control: own, exports: Default::default() })
    }

    pub fn streams(&self) -> impl Iterator<Item = &Arc<CudaStream>> {
        self.out.iter().chain(&self.into)
    }

    pub fn reaches(&self, rank: usize) -> bool {
        self.links[rank].is_some()
    }

    /// Posts one message to `rank` of these parts (address, bytes), which live until the streams have passed.
    pub fn send(&self, rank: usize, parts: &[(CUdeviceptr, usize)]) -> Result<(), DriverError> {
        let link = self.links[rank].as_ref().expect("a rank that is reached");
        for piece in cut(parts, piece_bytes(parts, self.slots.bytes)) {
            let number = link.sent.get().wrapping_add(1);
            let (stream, at) = (self.out[number as usize % WAYS].cu_stream(), self.places(number));
            // SAFETY: the stream is live; flag, credit and slot lie within the regions mapped in `connect`; the parts are
            // the caller's and live. Nobody reads the slot before the flag, and the credit says that nobody reads it still.
            unsafe {
                ok(sys::cuStreamWaitValue32_v2(stream, link.mine + at.credit, number.wrapping_sub(self.slots.count as u32), GEQ))?;
                for (from, within, bytes) in piece {
                    ok(sys::cuMemcpyAsync(link.theirs + at.slot + within as u64, from, bytes, stream))?;
                }
                ok(sys::cuStreamWriteValue32_v2(stream, link.theirs + at.flag, number, 0))?;
            }
            link.sent.set(number);
        }
        Ok(())
    }

    /// Posts the receive of one message from `rank` into these parts.
    pub fn receive(&self, rank: usize, parts: &[(CUdeviceptr, usize)]) -> Result<(), DriverError> {
        let link = self.links[rank].as_ref().expect("a rank that is reached");
        for piece in cut(parts, piece_bytes(parts, self.slots.bytes)) {
            let number = link.received.get().wrapping_add(1);
            let (stream, at) = (self.into[number as usize % WAYS].cu_stream(), self.places(number));
            // SAFETY: as in `send`; the parts are the caller's, and nobody reads them before the streams have passed.
            unsafe {
                ok(sys::cuStreamWaitValue32_v2(stream, link.mine + at.flag, number, GEQ))?;
                for (to, within, bytes) in piece {
                    ok(sys::cuMemcpyAsync(to, link.mine + at.slot + within as u64, bytes, stream))?;
                }
                ok(sys::cuStreamWriteValue32_v2(stream, link.theirs + at.credit, number, 0))?;
            }
            link.received.set(number);
        }
        Ok(())
    }

    /// Of a piece, in its region.
    fn places(&self, number: u32) -> Places {
        let index = number as usize % self.slots.count;
        let flag = self.slots.count * self.slots.bytes + 2 * LINE * index;
        Places { slot: (index * self.slots.bytes) as u64, flag: flag as u64, credit: (flag + LINE) as u64 }
    }
}

struct Places {
    slot: u64,
    flag: u64,
    credit: u64,
}

/// Counted modulo 2³²: what is less than 2³¹ ahead has not come.
const GEQ: u32 = sys::CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_GEQ as u32;

fn ok(code: CUresult) -> Result<(), DriverError> {
    code.result()
}

/// An eighth of the message, so that little is left to be taken out when the last of it has come; within limits.
fn piece_bytes(parts: &[(CUdeviceptr, usize)], slot: usize) -> usize {
    let whole: usize = parts.iter().map(|&(_, bytes)| bytes).sum();
    whole.div_ceil(8).next_multiple_of(PAGE_BYTES).clamp(slot.min(2 << 20), slot)
}

/// The parts of a message as pieces of at most `slot` bytes, (address, place in the slot, bytes) each. A function of the
/// parts' lengths alone, so both sides cut alike. Nothing to send: no piece.
fn cut(parts: &[(CUdeviceptr, usize)], slot: usize) -> Vec<Vec<(CUdeviceptr, usize, usize)>> {
    let (mut pieces, mut used) = (Vec::<Vec<_>>::new(), slot);
    for &(start, length) in parts {
        let mut done = 0;
        while done < length {
            if used >= slot {
                pieces.push(Vec::new());
                used = 0;
            }
            let bytes = (length - done).min(slot - used);
            pieces.last_mut().expect("just pushed").push((start + done as u64, used, bytes));
            done += bytes;
            used = (used + bytes).next_multiple_of(ALIGN);
        }
    }
    pieces
}

impl Card {
    fn of(context: &Arc<CudaContext>, node: usize) -> Result<Card, DriverError> {
        let mut bus = [0 as c_char; 16];
        // SAFETY: a place for the id, with its length.
        unsafe { ok(sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as i32, context.cu_device()))? };
        Ok(Card { node: node as u64, bus: bus.map(|c| c as u8) })
    }

    fn bytes(&self) -> Vec<u8> {
        [&self.node.to_le_bytes()[..], &self.bus].concat()
    }

    fn read(bytes: &[u8]) -> Card {
        let part = |from: usize, to: usize| &bytes[from..to];
        Card {
            node: u64::from_le_bytes(part(0, 8).try_into().expect("8 bytes")),
            bus: part(8, 24).try_into().expect("16 bytes"),
        }
    }

    /// Can this GPU use the other's memory? False where it is on another node, or not to be seen from here.
    fn reaches(&self, context: &Arc<CudaContext>, other: &Card) -> bool {
        if self.node != other.node || self.bus == other.bus {
            return false;
        }
        let name: Vec<u8> = other.bus.iter().copied().take_while(|&byte| byte != 0).collect();
        let name = CString::new(name).expect("cut at its zero");
        let (mut device, mut can) = (0, 0);
        // SAFETY: a zero-ended text and places for one value each.
        unsafe {
            sys::cuDeviceGetByPCIBusId(&mut device, name.as_ptr()).result().is_ok()
                && sys::cuDeviceCanAccessPeer(&mut can, context.cu_device(), device).result().is_ok()
                && can == 1
        }
    }

}

/// `bytes` of this GPU, zeroed, for the peers to open; none: no peer opens it.
fn region(bytes: usize) -> Result<(CUdeviceptr, [u8; 64]), DriverError> {
    let (mut base, mut handle) = (0, sys::CUipcMemHandle { reserved: [0; 64] });
    if bytes > 0 {
        // SAFETY: places for one value each; the memory is set before anyone else knows of it.
        unsafe {
            ok(sys::cuMemAlloc_v2(&mut base, bytes))?;
            ok(sys::cuMemsetD8_v2(base, 0, bytes))?;
            ok(sys::cuCtxSynchronize())?;
            ok(sys::cuIpcGetMemHandle(&mut handle, base))?;
        }
    }
    Ok((base, handle.reserved.map(|c| c as u8)))
}

/// Maps another rank's memory. This rank's own GPU is current: opened with the other's it would work, through the host.
fn open(handle: [u8; 64]) -> Result<CUdeviceptr, DriverError> {
    let mut base = 0;
    let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
    let peer_access = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
    // SAFETY: a handle that its owner's driver made.
    unsafe { ok(sys::cuIpcOpenMemHandle_v2(&mut base, handle, peer_access))? };
    Ok(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_hold_every_byte_once_and_in_order() {
        for (lengths, slot) in [(&[5usize, 0, 700, 256, 1][..], 512), (&[], 512), (&[0, 0], 512), (&[512, 512], 512), (&[10_000], 512), (&[300, 300, 300], 1024)] {
            let mut start = 1 << 20;
            let parts: Vec<(CUdeviceptr, usize)> = lengths.iter().map(|&length| {
                start += 1 << 16;
                (start, length)
            }).collect();
            let pieces = cut(&parts, slot);
            let mut next = parts.iter().flat_map(|&(start, length)| (0..length as u64).map(move |byte| start + byte));
            for piece in &pieces {
                let mut end = 0;
                assert!(!piece.is_empty());
                for &(from, at, bytes) in piece {
                    assert!(at >= end && at % ALIGN == 0 && bytes > 0, "{lengths:?}: {piece:?}");
                    end = at + bytes;
                    (from..from + bytes as u64).for_each(|byte| assert_eq!(next.next(), Some(byte), "{lengths:?}"));
                }
                assert!(end <= slot);
            }
            assert_eq!(next.next(), None, "{lengths:?}");
        }
    }

    #[test]
    fn a_card_reads_as_it_was_written() {
        let card = Card { node: 1 << 40, bus: *b"0000:1b:00.0\0\0\0\0" };
        let read = Card::read(&card.bytes());
        assert_eq!((read.node, read.bus), (card.node, card.bus));
    }
}
