//! Ranks as GPUs, over NCCL 2.28 (loaded at run time): the library, one communicator with one non-blocking stream
//! an axis, and the events that order it against torch, which works on the null stream. The collectives are in
//! `nccl/collectives.rs`.
//!
//! Invariants: a transfer starts after what the null stream was given before the call, and what the null stream
//! is given after the wait starts after the transfer; the tensors that a transfer touches live until that wait,
//! so torch cannot hand their memory out meanwhile. A GPU stream that waits for a dead peer waits for ever: the
//! launcher's heartbeat ends the process, not this file.
#![allow(unsafe_code)]

mod collectives;

use super::{Comm, CommError, Reduce, broadcast_bytes};
use collectives::NcclComm;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};
use cudarc::nccl::sys;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// How the GPU group is made.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// This rank's GPU.
    pub device: usize,
    /// libnccl.so.2 by its path; absent: as the loader finds it (it is there once libtorch_cuda is loaded).
    pub library: Option<PathBuf>,
    /// Most thread blocks NCCL may occupy at a time on this axis; absent: NCCL's own choice. Axes whose transfers
    /// run at once, and a GEMM beside them, must fit on the GPU together.
    pub max_ctas: Option<i32>,
    /// Sums in NCCL's order and rounding instead of in rank order and FP32: faster, but it depends on the layout.
    pub native_sums: bool,
}

/// The GPU communicator of the ranks of `control`, which goes on carrying what lies in host memory (counts, small
/// messages). Collective. Errors: no such GPU or library, or NCCL's own.
pub fn connect(control: Comm, options: &Options) -> Result<Comm, CommError> {
    let library = Rc::new(Library::load(options)?);
    let context = CudaContext::new(options.device).map_err(|e| driver_error(&*control, "connect", e))?;
    Ok(Rc::new(NcclComm::new(Axis::new(control, library, context, options)?)))
}

type Code = c_int;
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;

/// NCCL's functions. cudarc's own loader never tries the name `libnccl.so.2`, and reads a result code that it
/// does not know as an enum; so these are looked up here, with its types and plain integers for codes.
struct Library {
    version: unsafe extern "C" fn(*mut c_int) -> Code,
    unique_id: unsafe extern "C" fn(*mut sys::ncclUniqueId) -> Code,
    init: unsafe extern "C" fn(*mut sys::ncclComm_t, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> Code,
    finalize: unsafe extern "C" fn(sys::ncclComm_t) -> Code,
    destroy: unsafe extern "C" fn(sys::ncclComm_t) -> Code,
    abort: unsafe extern "C" fn(sys::ncclComm_t) -> Code,
    async_error: unsafe extern "C" fn(sys::ncclComm_t, *mut Code) -> Code,
    last_error: unsafe extern "C" fn(sys::ncclComm_t) -> *const c_char,
    group_start: unsafe extern "C" fn() -> Code,
    group_end: unsafe extern "C" fn() -> Code,
    send: unsafe extern "C" fn(*const c_void, usize, u32, c_int, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    recv: unsafe extern "C" fn(*mut c_void, usize, u32, c_int, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, c_int, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, u32, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    reduce_scatter: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, u32, sys::ncclComm_t, sys::cudaStream_t) -> Code,
}

impl Library {
    fn load(options: &Options) -> Result<Self, CommError> {
        let path = options.library.clone().unwrap_or_else(|| "libnccl.so.2".into());
        let refuse = |e: libloading::Error| CommError::Unsupported { op: "connect", reason: format!("{}: {e}", path.display()) };
        // SAFETY: NCCL's initialisers have no preconditions; the signatures are those of nccl.h 2.28.
        unsafe {
            let library = libloading::Library::new(&path).map_err(refuse)?;
            macro_rules! symbol {
                ($name:literal) => {
                    *library.get($name).map_err(refuse)?
                };
            }
            let functions = Library {
                version: symbol!(b"ncclGetVersion"),
                unique_id: symbol!(b"ncclGetUniqueId"),
                init: symbol!(b"ncclCommInitRankConfig"),
                finalize: symbol!(b"ncclCommFinalize"),
                destroy: symbol!(b"ncclCommDestroy"),
                abort: symbol!(b"ncclCommAbort"),
                async_error: symbol!(b"ncclCommGetAsyncError"),
                last_error: symbol!(b"ncclGetLastError"),
                group_start: symbol!(b"ncclGroupStart"),
                group_end: symbol!(b"ncclGroupEnd"),
                send: symbol!(b"ncclSend"),
                recv: symbol!(b"ncclRecv"),
                all_gather: symbol!(b"ncclAllGather"),
                broadcast: symbol!(b"ncclBroadcast"),
                all_reduce: symbol!(b"ncclAllReduce"),
                reduce_scatter: symbol!(b"ncclReduceScatter"),
            };
            // Never unloaded: the pointers are into it, and NCCL has threads of its own.
            std::mem::forget(library);
            Ok(functions)
        }
    }

    fn error_text(&self) -> String {
        // SAFETY: takes a null communicator; gives a zero-ended text that stays NCCL's.
        unsafe {
            let text = (self.last_error)(std::ptr::null_mut());
            if text.is_null() { "NCCL gives no reason".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        }
    }
}

/// One axis: an NCCL communicator, its stream, and torch's.
struct Axis {
    raw: sys::ncclComm_t,
    stream: Arc<CudaStream>,
    compute: Arc<CudaStream>,
    context: Arc<CudaContext>,
    library: Rc<Library>,
    /// The same ranks over MPI.
    control: Comm,
    options: Options,
}

/// A point in a stream.
struct Mark(CudaEvent);

/// One message of a group.
enum Move<'a> {
    Send(&'a Tensor, usize),
    Receive(&'a Tensor, usize),
}

impl Axis {
    fn new(control: Comm, library: Rc<Library>, context: Arc<CudaContext>, options: &Options) -> Result<Self, CommError> {
        const OP: &str = "connect";
        let failed = |e| driver_error(&*control, OP, e);
        let (compute, stream) = (context.default_stream(), context.new_stream().map_err(failed)?);
        let mut axis = Axis { raw: std::ptr::null_mut(), stream, compute, context, library, control, options: options.clone() };
        // Rank 0 makes the id, MPI carries it.
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        if axis.control.rank() == 0 {
            // SAFETY: a place for one id.
            axis.check(OP, unsafe { (axis.library.unique_id)(&mut id) })?;
        }
        let bytes = broadcast_bytes(&*axis.control, &id.internal.map(|c| c as u8), 0)?;
        for (to, from) in id.internal.iter_mut().zip(bytes) {
            *to = from as c_char;
        }
        let mut config = axis.config()?;
        let (size, rank) = (axis.control.size() as c_int, axis.control.rank() as c_int);
        axis.context.bind_to_thread().map_err(|e| driver_error(&*axis.control, OP, e))?;
        // SAFETY: the id is rank 0's on every rank, the config is whole, this rank's GPU is current. Blocks until
        // all ranks are here.
        let code = unsafe { (axis.library.init)(&mut axis.raw, size, id, rank, &mut config) };
        axis.check(OP, code)?;
        Ok(axis)
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

    /// From here on this axis' stream comes after all that torch has been given.
    fn fork(&self, op: &'static str) -> Result<(), CommError> {
        self.order(&self.stream, &self.compute, op)
    }

    fn order(&self, later: &CudaStream, earlier: &CudaStream, op: &'static str) -> Result<(), CommError> {
        let event = earlier.record_event(None).map_err(|e| driver_error(&*self.control, op, e))?;
        later.wait(&event).map_err(|e| driver_error(&*self.control, op, e))
    }

    /// Where this axis' stream is now.
    fn mark(&self, op: &'static str) -> Result<Mark, CommError> {
        self.stream.record_event(None).map(Mark).map_err(|e| driver_error(&*self.control, op, e))
    }

    /// Torch's later work comes after the mark. The host does not wait.
    fn join(&self, mark: &Mark, op: &'static str) -> Result<(), CommError> {
        let mut code = SUCCESS;
        // SAFETY: a live communicator and a place for one code.
        self.check(op, unsafe { (self.library.async_error)(self.raw, &mut code) })?;
        self.check(op, code)?;
        self.compute.wait(&mark.0).map_err(|e| driver_error(&*self.control, op, e))
    }

    /// All messages as one operation: none waits for another.
    fn group(&self, op: &'static str, moves: &[Move]) -> Result<(), CommError> {
        // SAFETY: no arguments.
        self.check(op, unsafe { (self.library.group_start)() })?;
        let mut outcome = Ok(());
        for one in moves {
            let code = match *one {
                Move::Send(tensor, peer) if tensor.numel() > 0 => {
                    let (at, bytes) = self.memory(tensor);
                    // SAFETY: `bytes` bytes of a live GPU tensor, which the caller keeps until it has joined.
                    unsafe { (self.library.send)(at, bytes, BYTE, peer as c_int, self.raw, self.raw_stream()) }
                }
                Move::Receive(tensor, peer) if tensor.numel() > 0 => {
                    let (at, bytes) = self.memory(tensor);
                    // SAFETY: as above; nobody reads the tensor before the join.
                    unsafe { (self.library.recv)(at, bytes, BYTE, peer as c_int, self.raw, self.raw_stream()) }
                }
                _ => SUCCESS,
            };
            outcome = outcome.and(self.check(op, code));
        }
        // A group once started must be ended, also after an error.
        // SAFETY: no arguments.
        let ended = self.check(op, unsafe { (self.library.group_end)() });
        outcome.and(ended)
    }

    /// `out` = everyone's `input`, in rank order.
    fn all_gather(&self, input: &Tensor, out: &Tensor) -> Result<(), CommError> {
        let ((from, bytes), (to, all)) = (self.memory(input), self.memory(out));
        assert_eq!(all, bytes * self.control.size(), "a place for every rank's part");
        // SAFETY: sizes as just asserted; both tensors are kept by the caller until it has joined.
        self.check("all_gather", unsafe { (self.library.all_gather)(from, to, bytes, BYTE, self.raw, self.raw_stream()) })
    }

    /// `root`'s `tensor` into everyone's.
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        let (at, bytes) = self.memory(tensor);
        // SAFETY: in place; the tensor is kept by the caller until it has joined.
        self.check("broadcast", unsafe { (self.library.broadcast)(at, at, bytes, BYTE, root as c_int, self.raw, self.raw_stream()) })
    }

    /// NCCL's own all-reduce, in its own order of addition.
    fn native_all_reduce(&self, input: &Tensor, out: &Tensor, reduce: Reduce) -> Result<(), CommError> {
        const OP: &str = "all_reduce";
        let ((from, bytes), (to, same)) = (self.memory(input), self.memory(out));
        assert_eq!((bytes, input.kind()), (same, out.kind()));
        let (kind, op) = (data_type(OP, input.kind())?, reduction(reduce));
        // SAFETY: as many elements of that type as both tensors have; both are kept until the join.
        self.check(OP, unsafe { (self.library.all_reduce)(from, to, input.numel(), kind, op, self.raw, self.raw_stream()) })
    }

    fn native_reduce_scatter(&self, input: &Tensor, out: &Tensor) -> Result<(), CommError> {
        const OP: &str = "reduce_scatter";
        let ((from, bytes), (to, part)) = (self.memory(input), self.memory(out));
        assert_eq!((bytes, input.kind()), (part * self.control.size(), out.kind()));
        let (kind, op) = (data_type(OP, input.kind())?, reduction(Reduce::Sum));
        // SAFETY: as above; `out` has this rank's part of the elements.
        self.check(OP, unsafe { (self.library.reduce_scatter)(from, to, out.numel(), kind, op, self.raw, self.raw_stream()) })
    }

    /// A tensor's memory on this rank's GPU, and its length in bytes.
    fn memory(&self, tensor: &Tensor) -> (*mut c_void, usize) {
        assert!(tensor.is_contiguous(), "NCCL takes contiguous memory");
        assert_eq!(tensor.device(), Device::Cuda(self.options.device), "a tensor of another device");
        (tensor.data_ptr(), tensor.numel() * tensor.kind().elt_size_in_bytes())
    }

    fn raw_stream(&self) -> sys::cudaStream_t {
        self.stream.cu_stream().cast()
    }

    fn check(&self, op: &'static str, code: Code) -> Result<(), CommError> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        let (rank, size) = (self.control.rank(), self.control.size());
        Err(CommError::Lost { rank, size, op, reason: format!("NCCL error {code}: {}", self.library.error_text()) })
    }
}

impl Drop for Axis {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        // SAFETY: the communicator is ours and not used again. A panicking rank's peers may never come, so it
        // aborts; else the stream is run dry first, since destroying does not wait for it.
        unsafe {
            if std::thread::panicking() || self.stream.synchronize().is_err() {
                (self.library.abort)(self.raw);
            } else {
                (self.library.finalize)(self.raw);
                (self.library.destroy)(self.raw);
            }
        }
    }
}

/// What is only moved is moved as bytes: NCCL need not know FP8.
const BYTE: u32 = sys::ncclDataType_t::ncclUint8 as u32;

fn data_type(op: &'static str, kind: Kind) -> Result<u32, CommError> {
    use sys::ncclDataType_t::*;
    let found = match kind {
        Kind::Double => ncclFloat64,
        Kind::Float => ncclFloat32,
        Kind::Half => ncclFloat16,
        Kind::BFloat16 => ncclBfloat16,
        Kind::Int64 => ncclInt64,
        Kind::Int => ncclInt32,
        Kind::Int8 => ncclInt8,
        Kind::Uint8 => ncclUint8,
        _ => return Err(CommError::Unsupported { op, reason: format!("NCCL has no sum of {kind:?}") }),
    };
    Ok(found as u32)
}

fn reduction(reduce: Reduce) -> u32 {
    use sys::ncclRedOp_t::*;
    (match reduce {
        Reduce::Sum => ncclSum,
        Reduce::Max => ncclMax,
        Reduce::Min => ncclMin,
    }) as u32
}

fn driver_error(control: &dyn super::Communicator, op: &'static str, error: DriverError) -> CommError {
    CommError::Lost { rank: control.rank(), size: control.size(), op, reason: format!("CUDA: {error:?}") }
}
