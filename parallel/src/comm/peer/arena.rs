//! Where peers write to. What a peer has opened of a GPU's memory stays taken when its owner gives it back, until the peer's
//! process ends, so it is never given back: a place that is free again is the next message's. Torch's own allocator gives back
//! what it keeps when the GPU is full, and counts on having it then.
//!
//! Invariant, as torch's: a place is handed out again as soon as its tensor is gone, to who comes after that in the null
//! stream's order.
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaContext, DriverError, result};
use kernels::shim;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

/// Of one GPU, for all groups of its process.
pub struct Arena {
    context: Arc<CudaContext>,
    device: usize,
    blocks: Arc<Mutex<Blocks>>,
}

/// As torch aligns.
const ALIGN: usize = 512;
/// What the driver gives out.
const PAGE: usize = 2 << 20;
/// A further segment is a quarter of what is there, so that there are few; within these.
const SEGMENT: [usize; 2] = [64 << 20, 1 << 30];

impl Arena {
    pub fn new(context: Arc<CudaContext>, device: usize) -> Arena {
        Arena { context, device, blocks: Default::default() }
    }

    /// A tensor of this shape, not written yet.
    pub fn room(&self, shape: &[i64], kind: Kind) -> Result<Tensor, DriverError> {
        let (on, bytes) = (Device::Cuda(self.device), shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes());
        if bytes == 0 {
            return Ok(Tensor::empty(shape, (kind, on)));
        }
        let length = bytes.next_multiple_of(ALIGN);
        let found = self.blocks.lock().expect("nobody panics with it").take(length);
        let at = found.map_or_else(|| self.grow(length), Ok)?;
        let blocks = self.blocks.clone();
        let back = move || blocks.lock().expect("nobody panics with it").give(at, length);
        // SAFETY: of a live segment, and nobody else's until it is given back.
        let bytes = unsafe { shim::wrap(at as *mut c_void, bytes, on, back) }.expect("a tensor in memory that is there");
        Ok(bytes.view_dtype(kind).view(shape))
    }

    pub fn bytes(&self) -> usize {
        self.blocks.lock().expect("nobody panics with it").segments.values().sum()
    }

    /// The first `length` bytes of a new segment. Where the GPU is full torch gives back what it keeps.
    fn grow(&self, length: usize) -> Result<CUdeviceptr, DriverError> {
        let more = length.max((self.bytes() / 4).clamp(SEGMENT[0], SEGMENT[1])).next_multiple_of(PAGE);
        self.context.bind_to_thread()?;
        let allocate = |bytes| {
            // SAFETY: never freed.
            unsafe { result::malloc_sync(bytes) }.map(|at| (at, bytes))
        };
        let (at, bytes) = allocate(more).or_else(|_| {
            shim::empty_cache().expect("torch's allocator");
            allocate(length.next_multiple_of(PAGE))
        })?;
        let mut blocks = self.blocks.lock().expect("nobody panics with it");
        blocks.add(at, bytes);
        Ok(blocks.take(length).expect("just added"))
    }
}

/// Addresses and lengths in bytes.
#[derive(Default)]
struct Blocks {
    segments: BTreeMap<CUdeviceptr, usize>,
    /// No two of a segment are neighbours.
    free: BTreeMap<CUdeviceptr, usize>,
}

impl Blocks {
    fn add(&mut self, at: CUdeviceptr, bytes: usize) {
        self.segments.insert(at, bytes);
        self.free.insert(at, bytes);
    }

    /// From the smallest that has room.
    fn take(&mut self, length: usize) -> Option<CUdeviceptr> {
        let (&at, &bytes) = self.free.iter().filter(|(_, bytes)| **bytes >= length).min_by_key(|(_, bytes)| **bytes)?;
        self.free.remove(&at);
        if bytes > length {
            self.free.insert(at + length as u64, bytes - length);
        }
        Some(at)
    }

    fn give(&mut self, at: CUdeviceptr, length: usize) {
        let (mut start, mut end) = (at, at + length as u64);
        if let Some((&before, &bytes)) = self.free.range(..at).next_back()
            && before + bytes as u64 == start
            && !self.segments.contains_key(&start)
        {
            start = before;
        }
        if let Some(&bytes) = self.free.get(&end)
            && !self.segments.contains_key(&end)
        {
            self.free.remove(&end);
            end += bytes as u64;
        }
        self.free.insert(start, (end - start) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Segments that touch: what the driver gives out may.
    fn blocks(segments: &[(CUdeviceptr, usize)]) -> Blocks {
        let mut blocks = Blocks::default();
        segments.iter().for_each(|&(at, bytes)| blocks.add(at, bytes));
        blocks
    }

    #[test]
    fn no_place_is_two_tensors_and_none_is_lost() {
        let segments = [(4096, 4096), (8192, 8192)];
        let mut blocks = blocks(&segments);
        let (mut taken, mut random) = (BTreeMap::<CUdeviceptr, usize>::new(), 1_u64);
        for _ in 0..10_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let length = 512 * (1 + (random >> 33) as usize % 5);
            match ((random >> 62) < 2 && !taken.is_empty()).then(|| *taken.keys().nth((random >> 40) as usize % taken.len()).expect("one of them")) {
                Some(at) => blocks.give(at, taken.remove(&at).expect("taken")),
                None => drop(blocks.take(length).map(|at| assert!(taken.insert(at, length).is_none()))),
            }
            let mut all: Vec<_> = taken.iter().chain(&blocks.free).map(|(&at, &bytes)| (at, bytes)).collect();
            all.sort();
            assert!(all.windows(2).all(|two| two[0].0 + two[0].1 as u64 == two[1].0), "{all:?}");
            assert_eq!(all.iter().map(|(_, bytes)| bytes).sum::<usize>(), 4096 + 8192);
            assert!(all.iter().any(|&(at, _)| at == 8192), "one lies over the border: {all:?}");
        }
        taken.into_iter().for_each(|(at, bytes)| blocks.give(at, bytes));
        assert_eq!(blocks.free.into_iter().collect::<Vec<_>>(), segments);
    }

    #[test]
    fn the_smallest_that_has_room_is_cut() {
        let mut blocks = blocks(&[(0, 4096), (8192, 1024), (16_384, 2048)]);
        assert_eq!([1024, 512, 2048, 4096].map(|length| blocks.take(length)), [Some(8192), Some(16_384), Some(0), None]);
    }
}
