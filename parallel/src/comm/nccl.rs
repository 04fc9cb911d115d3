//! Ranks as GPUs. Between GPUs of one host that reach each other's memory everything moves by copy engine (`peer.rs`);
//! between others, and where NCCL's own sums are wanted, over NCCL 2.28, loaded at run time (`nccl/library.rs`). Here is
//! one axis: its streams, and the events that order them against torch, which works on the null stream. The
//! collectives are in `nccl/collectives.rs`.
//!
//! Invariants: a transfer starts after what the null stream was given before the call, and what the null stream
//! is given after the wait starts after the transfer; the tensors that a transfer touches live until that wait,
//! so torch cannot hand their memory out meanwhile. A GPU stream that waits for a dead peer waits for ever: the
//! launcher's heartbeat ends the process, not this file.
#![allow(unsafe_code)]

mod collectives;
mod library;

use super::local::solo;
use super::peer::{Arena, Parts, Peers, Slots};
use super::{Comm, CommError, Reduce, broadcast_bytes};
use collectives::NcclComm;
use cudarc::driver::result as driver;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};
use cudarc::nccl::sys;
use library::{BYTE, Code, IN_PROGRESS, Library, SUCCESS, data_type, reduction};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// How the GPU group is made.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// This rank's GPU.
    pub device: usize,
    /// This rank's host; only ranks of one host are tried as peers.
    pub node: usize,
    /// Ranks of a host write into each other's memory; else everything goes over NCCL.
    pub peers: bool,
    /// How they do; absent: as suits the number of ranks.
    pub slots: Option<Slots>,
    /// In the world, for what is said of a link that fails.
    pub rank: usize,
    /// libnccl.so.2 by its path; absent: as the loader finds it (it is there once libtorch_cuda is loaded).
    pub library: Option<PathBuf>,
    /// Most thread blocks NCCL may occupy at a time on this axis; absent: NCCL's own choice. Axes whose transfers
    /// run at once, and a GEMM beside them, must fit on the GPU together.
    pub max_ctas: Option<i32>,
    /// Sums in NCCL's order and rounding instead of in rank order and FP32: faster, but it depends on the layout.
    pub native_sums: bool,
    /// Of all axes that are split from this one.
    pub hold: Hold,
}

/// While it is held, communicators that are dropped are left to the end of the process. NCCL gives one back together with its
/// peers, and where this rank has failed they wait for it elsewhere: its error would never be said. Clones are one.
#[derive(Clone, Debug, Default)]
pub struct Hold(Rc<Cell<bool>>);

impl Hold {
    pub fn held() -> Self {
        Hold(Rc::new(Cell::new(true)))
    }

    /// Every rank has come to its end, and drops what it has.
    pub fn let_go(&self) {
        self.0.set(false);
    }
}

/// What becomes of a communicator that is dropped.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Left,
    Aborted,
    GivenBack,
}

impl End {
    /// Peers of a rank that panics, or ends with transfers under way, may never come, so it aborts. Destroying does not wait for
    /// the stream: it is run dry first.
    fn of(hold: &Hold, panicking: bool, runs_dry: impl FnOnce() -> bool) -> End {
        match () {
            () if hold.0.get() => End::Left,
            () if panicking || !runs_dry() => End::Aborted,
            () => End::GivenBack,
        }
    }
}

/// The GPU communicator of the ranks of `control`, which goes on carrying what lies in host memory (counts, small
/// messages). Collective. Errors: no such GPU or library, or NCCL's own.
pub fn connect(control: Comm, options: &Options) -> Result<Comm, CommError> {
    let library = Rc::new(Library::load(options.library.as_deref())?);
    let context = CudaContext::new(options.device).map_err(|e| driver_error(&*control, "connect", e))?;
    if control.size() == 1 {
        return Ok(solo());
    }
    let arena = Rc::new(Arena::new(context.clone(), options.device));
    let axis = Axis::new(control, library, (context, arena), options)?;
    let refused = axis.peers.as_ref().map_or(0, |peers| peers.refused);
    if refused > 0 && axis.control.rank() == 0 {
        tracing::info!("{refused} pairs of GPUs of one host do not reach each other's memory: NCCL carries between them");
    }
    Ok(Rc::new(NcclComm::new(axis, true)))
}

/// The ranks of one axis.
struct Axis {
    peers: Option<Peers>,
    /// Absent where all are reached in memory and nobody wants NCCL's sums.
    nccl: Option<Nccl>,
    /// For what peers write. The same on all axes.
    arena: Rc<Arena>,
    compute: Arc<CudaStream>,
    context: Arc<CudaContext>,
    library: Rc<Library>,
    /// The same ranks over MPI.
    control: Comm,
    options: Options,
    /// Some pair of ranks does not reach each other in memory.
    any_far: bool,
}

/// NCCL's communicator and the non-blocking stream that it works on.
struct Nccl {
    raw: sys::ncclComm_t,
    stream: Arc<CudaStream>,
    library: Rc<Library>,
    watch: Option<Watch>,
    hold: Hold,
}

/// What a communicator's last transfers may take when nobody waits for them any more.
const DRY: Duration = Duration::from_secs(10);

/// Ends the process when NCCL finds an error: its kernels wait on for a link that has failed, and so does whoever waits for
/// their stream. Dropped before the communicator is.
struct Watch {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    const EVERY: Duration = Duration::from_secs(1);

    fn start(raw: sys::ncclComm_t, library: &Library, rank: usize) -> Watch {
        let (over, raw, async_error) = (Arc::new(AtomicBool::new(false)), raw as usize, library.async_error);
        let seen = over.clone();
        let look = move || {
            while !seen.load(Ordering::Acquire) {
                let mut code = SUCCESS;
                // SAFETY: a communicator that lives as long as this watch, and a place for one code; NCCL takes this call from any thread.
                let asked = unsafe { async_error(raw as sys::ncclComm_t, &mut code) };
                if let Some(code) = [asked, code].into_iter().find(|&code| code != SUCCESS && code != IN_PROGRESS) {
                    // In one piece: whoever starts the ranks may label each write, and the launcher reads whole lines.
                    let words = format!("error (told by rank {rank}): NCCL error {code} of a transfer under way\n");
                    let _ = std::io::stderr().write_all(words.as_bytes());
                    // SAFETY: no arguments. Handlers at exit could wait for the GPU.
                    unsafe { libc::_exit(1) };
                }
                std::thread::park_timeout(Self::EVERY);
            }
        };
        Watch { over, thread: Some(std::thread::spawn(look)) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return };
        thread.thread().unpark();
        let _ = thread.join();
    }
}

/// A point in all streams of an axis.
struct Mark(Vec<CudaEvent>);

/// Of this rank's GPU: an address and bytes, which whoever posts keeps alive until it has joined.
type Memory = (*mut c_void, usize);

/// One piece of memory that goes to a rank or comes from it.
enum Move {
    Send(Memory, usize),
    Receive(Memory, usize),
}

impl Move {
    fn peer(&self) -> usize {
        match *self {
            Move::Send(_, peer) | Move::Receive(_, peer) => peer,
        }
    }
}

impl Axis {
    fn new(control: Comm, library: Rc<Library>, (context, arena): (Arc<CudaContext>, Rc<Arena>), options: &Options) -> Result<Self, CommError> {
        let connect = || Peers::connect(&*control, &context, options.node, options.slots);
        let peers = options.peers.then(connect).transpose()?;
        let far = |rank: usize| rank != control.rank() && !peers.as_ref().is_some_and(|peers| peers.reaches(rank));
        // The same on all ranks: a pair is near or far for both.
        let any_far = super::gather_bytes(&*control, &[(0..control.size()).any(far) as u8])?.concat().contains(&1);
        let compute = context.default_stream();
        let mut axis = Axis { peers, nccl: None, arena, compute, context, library, control, options: options.clone(), any_far };
        if any_far || options.native_sums {
            axis.nccl = Some(axis.open_nccl()?);
        }
        Ok(axis)
    }

    /// Blocks until all ranks are here.
    fn open_nccl(&self) -> Result<Nccl, CommError> {
        const OP: &str = "connect";
        let failed = |e| driver_error(&*self.control, OP, e);
        let (stream, library, hold) = (self.context.new_stream().map_err(failed)?, self.library.clone(), self.options.hold.clone());
        let mut nccl = Nccl { raw: std::ptr::null_mut(), stream, library, watch: None, hold };
        // Rank 0 makes the id, MPI carries it.
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        if self.control.rank() == 0 {
            // SAFETY: a place for one id.
            self.check(OP, unsafe { (self.library.unique_id)(&mut id) })?;
        }
        let bytes = broadcast_bytes(&*self.control, &id.internal.map(|c| c as u8), 0)?;
        for (to, from) in id.internal.iter_mut().zip(bytes) {
            *to = from as c_char;
        }
        let mut config = self.config()?;
        let (size, rank) = (self.control.size() as c_int, self.control.rank() as c_int);
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the id is rank 0's on every rank, the config is whole, this rank's GPU is current.
        let code = unsafe { (self.library.init)(&mut nccl.raw, size, id, rank, &mut config) };
        self.check(OP, code)?;
        nccl.watch = Some(Watch::start(nccl.raw, &self.library, self.options.rank));
        Ok(nccl)
    }

    /// NCCL_CONFIG_INITIALIZER of nccl.h, with this axis' wishes.
    fn config(&self) -> Result<sys::ncclConfig_t, CommError> {
        const UNDEFINED: c_int = c_int::MIN;
        let mut version = 0;
        // SAFETY: a place for one integer.
        self.check("connect", unsafe { (self.library.version)(&mut version) })?;
        // SAFETY: integers and pointers, for which zero is a value.
        let mut config: sys::ncclConfig_t = unsafe { std::mem::zeroed() };
        config.size = size_of::<sys::ncclConfig_t>();
        config.magic = 0xcafe_beef;
        config.version = version as u32;
        (config.blocking, config.cgaClusterSize, config.minCTAs) = (1, UNDEFINED, UNDEFINED);
        config.maxCTAs = self.options.max_ctas.unwrap_or(UNDEFINED);
        (config.splitShare, config.trafficClass, config.collnetEnable) = (UNDEFINED, UNDEFINED, UNDEFINED);
        (config.CTAPolicy, config.shrinkShare, config.nvlsCTAs) = (UNDEFINED, UNDEFINED, UNDEFINED);
        (config.nChannelsPerNetPeer, config.nvlinkCentricSched) = (UNDEFINED, UNDEFINED);
        Ok(config)
    }

    fn streams(&self) -> impl Iterator<Item = &Arc<CudaStream>> {
        let peers = self.peers.iter().flat_map(Peers::streams);
        peers.chain(self.nccl.iter().map(|nccl| &nccl.stream))
    }

    /// From here on this axis' streams come after all that torch has been given.
    fn fork(&self, op: &'static str) -> Result<(), CommError> {
        let failed = |e| driver_error(&*self.control, op, e);
        let event = self.compute.record_event(None).map_err(failed)?;
        self.streams().try_for_each(|stream| stream.wait(&event).map_err(failed))
    }

    /// Where this axis' streams are now.
    fn mark(&self, op: &'static str) -> Result<Mark, CommError> {
        let events = self.streams().map(|stream| stream.record_event(None)).collect::<Result<_, _>>();
        events.map(Mark).map_err(|e| driver_error(&*self.control, op, e))
    }

    /// Torch's later work comes after the mark. The host does not wait.
    fn join(&self, mark: &Mark, op: &'static str) -> Result<(), CommError> {
        if let Some(nccl) = &self.nccl {
            let mut code = SUCCESS;
            // SAFETY: a live communicator and a place for one code.
            self.check(op, unsafe { (self.library.async_error)(nccl.raw, &mut code) })?;
            self.check(op, code)?;
        }
        mark.0.iter().try_for_each(|event| self.compute.wait(event)).map_err(|e| driver_error(&*self.control, op, e))
    }

    /// Not written yet; where nobody is told of it, torch's.
    fn room(&self, op: &'static str, shape: &[i64], kind: Kind) -> Result<Tensor, CommError> {
        if self.any_far || self.peers.is_none() {
            return Ok(Tensor::empty(shape, (kind, Device::Cuda(self.options.device))));
        }
        self.arena.room(shape, kind).map_err(|e| driver_error(&*self.control, op, e))
    }

    /// All as one operation: none waits for another. `in_step`: every rank of the axis posts at this place of its program, and
    /// what comes has `room`.
    fn post(&self, op: &'static str, moves: &[Move], in_step: bool) -> Result<(), CommError> {
        let near = |peer: usize| self.peers.as_ref().filter(|peers| peers.reaches(peer));
        let far: Vec<&Move> = moves.iter().filter(|one| near(one.peer()).is_none()).collect();
        if !far.is_empty() {
            self.post_nccl(op, &far)?;
        }
        let Some(peers) = &self.peers else { return Ok(()) };
        let (mut sends, mut receives) = (vec![Parts::new(); self.control.size()], vec![Parts::new(); self.control.size()]);
        for one in moves.iter().filter(|one| near(one.peer()).is_some()) {
            let (Move::Send((at, bytes), peer) | Move::Receive((at, bytes), peer)) = *one;
            if bytes > 0 {
                let list = if matches!(one, Move::Send(..)) { &mut sends } else { &mut receives };
                list[peer].push((at as u64, bytes));
            }
        }
        // Of a group that reaches beyond a host most comes over NCCL, and the memory for all of it stays torch's.
        if in_step && !self.any_far {
            return peers.exchange(&sends, &receives);
        }
        // A message each: the peer may post what meets them one by one.
        let sent = peers.ring().try_for_each(|peer| sends[peer].iter().try_for_each(|&part| peers.send(peer, &[part])));
        let received = || peers.ring().rev().try_for_each(|peer| receives[peer].iter().try_for_each(|&part| peers.receive(peer, &[part])));
        sent.and_then(|()| received()).map_err(|e| driver_error(&*self.control, op, e))
    }

    /// What a rank sends itself, beside the other transfers.
    fn copy(&self, op: &'static str, (from, bytes): Memory, (to, room): Memory) -> Result<(), CommError> {
        assert_eq!(bytes, room, "as much room as is sent");
        let stream = self.streams().last().unwrap_or(&self.compute);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as many live bytes of this rank's GPU on both sides, which the caller keeps until it has joined.
        let copied = unsafe { driver::memcpy_dtod_async(to as u64, from as u64, bytes, stream.cu_stream()) };
        copied.map_err(|e| driver_error(&*self.control, op, e))
    }

    fn post_nccl(&self, op: &'static str, moves: &[&Move]) -> Result<(), CommError> {
        let nccl = self.nccl.as_ref().expect("a rank that no peer transport reaches");
        // SAFETY: no arguments.
        self.check(op, unsafe { (self.library.group_start)() })?;
        let mut outcome = Ok(());
        for &one in moves {
            let (Move::Send((at, bytes), peer) | Move::Receive((at, bytes), peer)) = *one;
            let code = match one {
                _ if bytes == 0 => SUCCESS,
                // SAFETY: `bytes` bytes of a live GPU tensor, which the caller keeps until it has joined.
                Move::Send(..) => unsafe { (self.library.send)(at, bytes, BYTE, peer as c_int, nccl.raw, nccl.raw_stream()) },
                // SAFETY: as above; nobody reads the tensor before the join.
                Move::Receive(..) => unsafe { (self.library.recv)(at, bytes, BYTE, peer as c_int, nccl.raw, nccl.raw_stream()) },
            };
            outcome = outcome.and(self.check(op, code));
        }
        // A group once started must be ended, also after an error.
        // SAFETY: no arguments.
        let ended = self.check(op, unsafe { (self.library.group_end)() });
        outcome.and(ended)
    }

    /// `out` = everyone's `input`, in rank order. NCCL crosses to each other host once, not once a rank.
    fn native_all_gather(&self, nccl: &Nccl, input: &Tensor, out: &Tensor) -> Result<(), CommError> {
        let ((from, bytes), (to, all)) = (self.memory(input), self.memory(out));
        assert_eq!(all, bytes * self.control.size(), "a place for every rank's part");
        // SAFETY: sizes as just asserted; both tensors are kept by the caller until it has joined.
        self.check("all_gather", unsafe { (self.library.all_gather)(from, to, bytes, BYTE, nccl.raw, nccl.raw_stream()) })
    }

    /// `root`'s `tensor` into everyone's.
    fn native_broadcast(&self, nccl: &Nccl, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        let (at, bytes) = self.memory(tensor);
        // SAFETY: in place; the tensor is kept by the caller until it has joined.
        self.check("broadcast", unsafe { (self.library.broadcast)(at, at, bytes, BYTE, root as c_int, nccl.raw, nccl.raw_stream()) })
    }

    /// NCCL's own sums, in its own order of addition; None: this group's are taken in rank order.
    fn native_sums(&self) -> Option<&Nccl> {
        self.nccl.as_ref().filter(|_| self.options.native_sums)
    }

    fn native_all_reduce(&self, nccl: &Nccl, input: &Tensor, out: &Tensor, reduce: Reduce) -> Result<(), CommError> {
        const OP: &str = "all_reduce";
        let ((from, bytes), (to, same)) = (self.memory(input), self.memory(out));
        assert_eq!((bytes, input.kind()), (same, out.kind()));
        let (kind, op) = (data_type(OP, input.kind())?, reduction(reduce));
        // SAFETY: as many elements of that type as both tensors have; both are kept until the join.
        self.check(OP, unsafe { (self.library.all_reduce)(from, to, input.numel(), kind, op, nccl.raw, nccl.raw_stream()) })
    }

    fn native_reduce_scatter(&self, nccl: &Nccl, input: &Tensor, out: &Tensor) -> Result<(), CommError> {
        const OP: &str = "reduce_scatter";
        let ((from, bytes), (to, part)) = (self.memory(input), self.memory(out));
        assert_eq!((bytes, input.kind()), (part * self.control.size(), out.kind()));
        let (kind, op) = (data_type(OP, input.kind())?, reduction(Reduce::Sum));
        // SAFETY: as above; `out` has this rank's part of the elements.
        self.check(OP, unsafe { (self.library.reduce_scatter)(from, to, out.numel(), kind, op, nccl.raw, nccl.raw_stream()) })
    }

    /// A tensor's memory on this rank's GPU, and its length in bytes.
    fn memory(&self, tensor: &Tensor) -> Memory {
        assert!(tensor.is_contiguous(), "transfers take contiguous memory");
        assert_eq!(tensor.device(), Device::Cuda(self.options.device), "a tensor of another device");
        (tensor.data_ptr(), tensor.numel() * tensor.kind().elt_size_in_bytes())
    }

    fn check(&self, op: &'static str, code: Code) -> Result<(), CommError> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        let (rank, size) = (self.control.rank(), self.control.size());
        Err(CommError::Lost { rank, size, op, reason: format!("NCCL error {code}: {}", self.library.error_text()) })
    }
}

impl Nccl {
    /// Not where a link or a peer has failed: the kernels then wait for ever.
    fn runs_dry(&self) -> bool {
        let (begun, mark) = (Instant::now(), self.stream.record_event(None));
        mark.is_ok_and(|mark| {
            while !mark.is_complete() && begun.elapsed() < DRY {
                std::thread::sleep(Duration::from_millis(1));
            }
            mark.is_complete()
        })
    }

    fn raw_stream(&self) -> sys::cudaStream_t {
        self.stream.cu_stream().cast()
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        self.watch = None;
        let end = End::of(&self.hold, std::thread::panicking(), || self.runs_dry());
        // SAFETY: the communicator is ours and not used again.
        unsafe {
            match end {
                End::Left => (),
                End::Aborted => drop((self.library.abort)(self.raw)),
                End::GivenBack => {
                    (self.library.finalize)(self.raw);
                    (self.library.destroy)(self.raw);
                }
            }
        }
    }
}

fn driver_error(control: &dyn super::Communicator, op: &'static str, error: DriverError) -> CommError {
    CommError::Lost { rank: control.rank(), size: control.size(), op, reason: format!("CUDA: {error:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failing_rank_drops_is_left_and_its_stream_not_waited_for() {
        let hold = Hold::held();
        let split = Options { hold: hold.clone(), ..Default::default() }.clone();
        let end = |panicking, dry| End::of(&split.hold, panicking, || dry);
        assert_eq!(End::of(&split.hold, false, || panic!("a failing rank waits for nobody")), End::Left);
        assert_eq!(end(true, true), End::Left);
        hold.let_go();
        assert_eq!([end(false, true), end(false, false), end(true, true)], [End::GivenBack, End::Aborted, End::Aborted]);
        assert_eq!(End::of(&Options::default().hold, false, || true), End::GivenBack, "nobody asked");
    }
}
