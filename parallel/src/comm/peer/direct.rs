//! Messages that both sides post in one call go straight to where the receiver wants them: it tells the sender the places
//! over MPI first (some 10 µs of the host, none of the GPU), each as a piece of an allocation and that allocation's handle,
//! which the sender opens once. What is allocated anew is another buffer to CUDA, so a place is never taken for an older
//! one. What a peer has opened never comes back to the driver: places that come and go are in the arena (`arena.rs`).
//!
//! A host that waits for another's here has put everything before it on its GPU, and the only other place where a host waits
//! is for counts in a forward: ranks of one group have their forwards behind them alike when gradients are complete, because
//! the last backward of a direction is never in a pair. Where ranks of a group run other stages (DualPipe's two copies in a step of
//! few micro-batches), gradients leave at the step's end alone.
//!
//! Invariant: the receiver says "ready" in its stream, so after everything that used the memory before; the flag says that
//! all parts are there. First every rank posts its "ready"s, then its sends, then its waits: nobody waits for a "ready"
//! that stands behind a wait.
use super::{GEQ, LINE, Link, Peers, ok};
use crate::comm::{CommError, TensorSpec};
use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUdeviceptr};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_char, c_void};
use tch::{Device, Kind, Tensor};

/// Memory parts (address, bytes), none empty.
pub type Parts = Vec<(CUdeviceptr, usize)>;

/// Buffer id, offset, then 64 bytes of handle: a part's place in words.
const WORDS: usize = 10;

/// A copy engine takes what waits for it in turns, a copy at a time: a row of tokens is not to wait for a whole gradient.
const COPY: usize = 16 << 20;

/// Of one rank, towards all.
#[derive(Default)]
pub(super) struct Exports {
    /// By buffer id: address and handle.
    known: RefCell<HashMap<u64, (CUdeviceptr, [i64; 8])>>,
}

/// Of one link.
#[derive(Default)]
pub(super) struct Direct {
    /// The peer's buffers, opened here.
    opened: RefCell<HashMap<u64, CUdeviceptr>>,
    sent: Cell<u32>,
    received: Cell<u32>,
}

impl Exports {
    /// None: memory that cannot be shared (torch's expandable segments).
    fn place(&self, at: CUdeviceptr) -> Result<Option<[i64; WORDS]>, DriverError> {
        let (mut id, mut known) = (0u64, self.known.borrow_mut());
        // SAFETY: a live address of this context, and a place for the attribute.
        unsafe { ok(sys::cuPointerGetAttribute((&raw mut id).cast::<c_void>(), sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID, at))? };
        let (base, handle) = match known.entry(id) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                let (mut base, mut handle) = (0, sys::CUipcMemHandle { reserved: [0; 64] });
                // SAFETY: as above; a place for one value. The size is not asked for.
                unsafe { ok(sys::cuMemGetAddressRange_v2(&mut base, std::ptr::null_mut(), at))? };
                // SAFETY: as above.
                if unsafe { sys::cuIpcGetMemHandle(&mut handle, base) }.result().is_err() {
                    return Ok(None);
                }
                let word = |bytes: &[c_char]| i64::from_le_bytes(std::array::from_fn(|i| bytes[i] as u8));
                *entry.insert((base, std::array::from_fn(|i| word(&handle.reserved[8 * i..][..8]))))
            }
        };
        let mut words = [0; WORDS];
        (words[0], words[1]) = (id as i64, (at - base) as i64);
        words[2..].copy_from_slice(&handle);
        Ok(Some(words))
    }
}

impl Direct {
    /// The peer's place, mapped here.
    fn open(&self, words: &[i64]) -> Result<CUdeviceptr, DriverError> {
        let (id, offset) = (words[0] as u64, words[1] as u64);
        if let Some(base) = self.opened.borrow().get(&id) {
            return Ok(base + offset);
        }
        let handle: Vec<u8> = words[2..].iter().flat_map(|word| word.to_le_bytes()).collect();
        let base = super::open(handle.try_into().expect("64 bytes"))?;
        self.opened.borrow_mut().insert(id, base);
        Ok(base + offset)
    }
}

impl Peers {
    /// Sends and receives a message to and from each rank that is reached, `sends` and `receives` by rank. Every rank of the
    /// group calls it at the same place of its program. The host waits for the others' hosts.
    pub fn exchange(&self, sends: &[Parts], receives: &[Parts]) -> Result<(), CommError> {
        let failed = |e: DriverError| CommError::Lost { rank: self.rank, size: self.links.len(), op: "exchange", reason: format!("CUDA: {e:?}") };
        let links = || self.ring().filter_map(|peer| Some((peer, self.links[peer].as_ref()?)));
        let mut told = Vec::new();
        for (peer, _) in links().filter(|&(peer, _)| !receives[peer].is_empty()) {
            let places: Option<Vec<_>> = receives[peer].iter().map(|&(at, _)| self.exports.place(at)).collect::<Result<_, _>>().map_err(failed)?;
            // Zeros where a place cannot be told: the message goes through the slots.
            let words = places.map_or_else(|| vec![0; receives[peer].len() * WORDS], |places| places.concat());
            told.push((peer, Tensor::from_slice(&words)));
        }
        let slotted: Vec<usize> = told.iter().filter(|(_, words)| words.int64_value(&[0]) == 0).map(|(peer, _)| *peer).collect();
        let spec = |parts: &Parts| TensorSpec { shape: vec![(parts.len() * WORDS) as i64], kind: Kind::Int64, device: Device::Cpu };
        let targets: Vec<_> = links().filter(|&(peer, _)| !sends[peer].is_empty()).collect();
        let asked = self.control.exchange(told, targets.iter().map(|&(peer, _)| (peer, spec(&sends[peer]))).collect())?.wait()?;
        for (_, link) in links().filter(|(peer, _)| !receives[*peer].is_empty() && !slotted.contains(peer)) {
            self.ready(link).map_err(failed)?;
        }
        for (&(peer, link), words) in targets.iter().zip(asked) {
            let words = Vec::<i64>::try_from(words).expect("i64 words");
            if words[0] == 0 { self.send(peer, &sends[peer]) } else { self.put(link, &sends[peer], &words) }.map_err(failed)?;
        }
        // Slots first: they are emptied whatever the direct messages wait for.
        let (through_slots, direct): (Vec<_>, Vec<_>) =
            links().rev().filter(|&(peer, _)| !receives[peer].is_empty()).partition(|(peer, _)| slotted.contains(peer));
        through_slots.iter().try_for_each(|&(peer, _)| self.receive(peer, &receives[peer])).map_err(failed)?;
        direct.iter().try_for_each(|(_, link)| self.arrive(link)).map_err(failed)?;
        Ok(())
    }

    /// Everyone else, each rank from its successor on. What goes to one follows what goes to the one before, so that ranks in
    /// step all have one sender: two share what a GPU takes in (four H100: 125–250 GB/s each, one alone 350). Backwards it is
    /// the order in which theirs come.
    pub fn ring(&self) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let (rank, size) = (self.rank, self.links.len());
        (1..size).map(move |step| (rank + step) % size)
    }

    /// What was told may be written.
    fn ready(&self, link: &Link) -> Result<(), DriverError> {
        let number = link.direct.received.get().wrapping_add(1);
        link.direct.received.set(number);
        // SAFETY: a live stream, and a word of the region mapped in `connect`.
        unsafe { ok(sys::cuStreamWriteValue32_v2(self.into[0].cu_stream(), link.theirs + self.direct_at() + LINE as u64, number, 0)) }
    }

    fn put(&self, link: &Link, parts: &Parts, words: &[i64]) -> Result<(), DriverError> {
        let number = link.direct.sent.get().wrapping_add(1);
        let (stream, at) = (self.out[0].cu_stream(), self.direct_at());
        let places: Vec<CUdeviceptr> = words.chunks(WORDS).map(|words| link.direct.open(words)).collect::<Result<_, _>>()?;
        // SAFETY: live streams and words of mapped regions; the parts are the caller's and live, the places are the
        // receiver's, of as many bytes, and nobody else uses them between its "ready" and the flag.
        unsafe {
            ok(sys::cuStreamWaitValue32_v2(stream, link.mine + at + LINE as u64, number, GEQ))?;
            for (&(from, bytes), to) in parts.iter().zip(places) {
                for at in (0..bytes).step_by(COPY) {
                    ok(sys::cuMemcpyAsync(to + at as u64, from + at as u64, COPY.min(bytes - at), stream))?;
                }
            }
            ok(sys::cuStreamWriteValue32_v2(stream, link.theirs + at, number, 0))?;
        }
        link.direct.sent.set(number);
        Ok(())
    }

    /// The newest message for which this rank said "ready" is there.
    fn arrive(&self, link: &Link) -> Result<(), DriverError> {
        // SAFETY: a live stream, and a word of this rank's region.
        unsafe { ok(sys::cuStreamWaitValue32_v2(self.into[0].cu_stream(), link.mine + self.direct_at(), link.direct.received.get(), GEQ)) }
    }

    /// Of the flag, behind those of the slots; the "ready" is a line further.
    fn direct_at(&self) -> u64 {
        (self.slots.count * (self.slots.bytes + 2 * LINE)) as u64
    }
}
