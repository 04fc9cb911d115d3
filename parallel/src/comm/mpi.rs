//! Ranks as processes, over MPI (Open MPI 4.1 through rsmpi): process start and end, and requests that own what
//! they read and write. The collectives are in `mpi/collectives.rs`, made of these sends and receives, because
//! MPI's own reductions promise no order of addition and know neither BF16 nor FP8.
//! Invariant: a tensor handed to MPI lives until its request is complete; if that can no longer be waited for
//! (a panic), its memory is leaked rather than freed under MPI's hands.
#![allow(unsafe_code)]

mod collectives;
mod progress;

use super::{Comm, CommError};
use collectives::MpiComm;
use ::mpi::environment::Universe;
use ::mpi::ffi;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{AsRaw, Communicator as _, Root as _};
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_int, c_void};
use std::rc::Rc;
use std::time::Duration;
use tch::{Device, Tensor};

/// MPI counts are C ints: a message over 2 GiB goes in pieces of this many bytes.
const PIECE_BYTES: usize = 1 << 30;

/// MPI in this process. It finalises when this and every communicator made from it are gone; dropped by a
/// panic it aborts the job instead, since the peers would wait for ever. A rank that ends early with an error must
/// call `abort` itself: finalising waits for the others.
pub struct MpiWorld {
    comm: Rc<MpiComm>,
}

/// What all communicators of the process share. The universe is dropped, and so MPI finalised, last.
struct Shared {
    in_flight: RefCell<Vec<Rc<progress::Flight>>>,
    piece_bytes: Cell<usize>,
    /// How long a wait keeps its core.
    spin: Duration,
    universe: Universe,
}

/// The cores that this process may use, as Linux lists them.
pub fn bound_to() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default().trim().to_string()
}

impl MpiWorld {
    /// Starts MPI. Other threads may exist but only the one that called this uses it (`Serialized`).
    /// Errors: MPI was started before, or cannot live beside other threads.
    pub fn init() -> Result<Self, CommError> {
        let refuse = |reason: String| CommError::Unsupported { op: "MPI_Init", reason };
        let (universe, level) = mpi::initialize_with_threading(mpi::Threading::Serialized)
            .ok_or_else(|| refuse("MPI has already been started in this process".into()))?;
        if level < mpi::Threading::Serialized {
            return Err(refuse(format!("this MPI offers threads only as {level:?}")));
        }
        let group = universe.world().duplicate();
        // SAFETY: the handle is live, and MPI_ERRORS_RETURN is a predefined handler. Sub-groups inherit it.
        unsafe { ffi::MPI_Comm_set_errhandler(group.as_raw(), ffi::RSMPI_ERRORS_RETURN) };
        let spin = progress::spin(&universe.world().split_shared(universe.world().rank()));
        let shared = Rc::new(Shared { in_flight: RefCell::default(), piece_bytes: Cell::new(PIECE_BYTES), spin, universe });
        Ok(MpiWorld { comm: Rc::new(MpiComm::new(Rc::new(Link { group, shared }))) })
    }

    /// All ranks of the job.
    pub fn comm(&self) -> Comm {
        self.comm.clone()
    }

    /// The node of every rank, in rank order, as numbers from 0 in order of first appearance: ranks that can
    /// share memory are on one node. Collective.
    pub fn nodes(&self) -> Result<Vec<usize>, CommError> {
        let world = self.comm();
        let on_node = self.link().shared.universe.world().split_shared(world.rank() as c_int);
        let mut leader = world.rank() as i64;
        on_node.process_at_rank(0).broadcast_into(&mut leader);
        let leaders = world.all_gather(vec![Tensor::from_slice(&[leader])])?.wait()?;
        let leaders = Vec::<i64>::try_from(&leaders[0]).expect("i64 ranks");
        let mut seen = Vec::new();
        let mut number = |leader: i64| {
            seen.iter().position(|&l| l == leader).unwrap_or_else(|| {
                seen.push(leader);
                seen.len() - 1
            })
        };
        Ok(leaders.into_iter().map(&mut number).collect())
    }

    /// The name of this rank's host.
    pub fn host(&self) -> String {
        mpi::environment::processor_name().unwrap_or_else(|_| "unnamed host".into())
    }

    /// Ends every rank of the job at once; mpirun's exit code becomes `code`.
    pub fn abort(&self, code: i32) -> ! {
        self.link().shared.universe.world().abort(code)
    }

    /// The longest single message. Smaller pieces let a test see the cutting; all ranks must set the same.
    pub fn set_piece_bytes(&self, bytes: usize) {
        assert!((1..=PIECE_BYTES).contains(&bytes), "pieces of 1 to {PIECE_BYTES} bytes, not {bytes}");
        self.link().shared.piece_bytes.set(bytes);
    }

    fn link(&self) -> &Link {
        self.comm.link()
    }
}

impl Drop for MpiWorld {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort(101);
        }
    }
}

/// One MPI group and how to send in it.
struct Link {
    group: SimpleCommunicator,
    shared: Rc<Shared>,
}

/// Sends and receives posted together.
#[derive(Default)]
struct Batch {
    requests: Vec<ffi::MPI_Request>,
    /// (peer, bytes) of each receive, `None` for a send.
    expected: Vec<Option<(usize, usize)>>,
    /// What the requests read and write.
    tensors: Vec<Tensor>,
    /// Where MPI reports; kept from poll to poll.
    statuses: Vec<ffi::MPI_Status>,
}

impl Link {
    /// Starts sending a contiguous CPU tensor. The receiver must expect the same number of bytes.
    fn send(&self, batch: &mut Batch, tensor: Tensor, to: usize, tag: c_int) -> Result<(), CommError> {
        for (start, bytes) in self.pieces(&tensor) {
            let mut request = null_request();
            // SAFETY: `start` points to `bytes` readable bytes of `tensor`, which `batch` keeps until the
            // request is complete.
            let code = unsafe { ffi::MPI_Isend(start, bytes as c_int, ffi::RSMPI_UINT8_T, to as c_int, tag, self.group.as_raw(), &mut request) };
            self.check(code, "send")?;
            batch.requests.push(request);
            batch.expected.push(None);
        }
        batch.tensors.push(tensor);
        Ok(())
    }

    /// Starts filling a contiguous CPU tensor.
    fn receive(&self, batch: &mut Batch, tensor: Tensor, from: usize, tag: c_int) -> Result<(), CommError> {
        for (start, bytes) in self.pieces(&tensor) {
            let mut request = null_request();
            // SAFETY: `start` points to `bytes` writable bytes of `tensor`, which `batch` keeps until the
            // request is complete, and which nobody reads before.
            let code = unsafe { ffi::MPI_Irecv(start, bytes as c_int, ffi::RSMPI_UINT8_T, from as c_int, tag, self.group.as_raw(), &mut request) };
            self.check(code, "receive")?;
            batch.requests.push(request);
            batch.expected.push(Some((from, bytes)));
        }
        batch.tensors.push(tensor);
        Ok(())
    }

    /// Start and length of each piece of a tensor's memory; none for an empty tensor.
    fn pieces(&self, tensor: &Tensor) -> Vec<(*mut c_void, usize)> {
        assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "MPI takes contiguous host memory");
        let total = byte_length(tensor);
        let start = tensor.data_ptr().cast::<u8>();
        let piece = self.shared.piece_bytes.get();
        // In bounds: every offset is below the tensor's length in bytes.
        (0..total).step_by(piece).map(|at| (start.wrapping_add(at).cast(), piece.min(total - at))).collect()
    }

    fn check(&self, code: c_int, op: &'static str) -> Result<(), CommError> {
        if code == ffi::MPI_SUCCESS as c_int { Ok(()) } else { Err(self.lost(op, error_text(code))) }
    }

    fn lost(&self, op: &'static str, reason: String) -> CommError {
        CommError::Lost { rank: self.group.rank() as usize, size: self.group.size() as usize, op, reason }
    }

    fn split(&self, colour: usize, key: usize) -> Link {
        let colour = mpi::topology::Color::with_value(colour as c_int);
        let group = self.group.split_by_color_with_key(colour, key as c_int).expect("a colour was given");
        Link { group, shared: self.shared.clone() }
    }
}

impl Batch {
    /// Lets MPI work; true once all requests are complete.
    fn poll(&mut self, link: &Link) -> Result<bool, CommError> {
        if self.requests.is_empty() {
            return Ok(true);
        }
        let mut done = 0;
        // SAFETY: a status is plain integers, for which zero is a value.
        self.statuses.resize(self.requests.len(), unsafe { std::mem::zeroed() });
        let statuses = &mut self.statuses;
        // SAFETY: both arrays have as many entries as said; the requests are ours and still active.
        let code = unsafe { ffi::MPI_Testall(self.requests.len() as c_int, self.requests.as_mut_ptr(), &mut done, statuses.as_mut_ptr()) };
        if code != ffi::MPI_SUCCESS as c_int {
            let code = statuses.iter().map(|s| s.MPI_ERROR).find(|&e| e != ffi::MPI_SUCCESS as c_int).unwrap_or(code);
            return Err(link.lost("wait", error_text(code)));
        }
        if done == 0 {
            return Ok(false);
        }
        self.requests.clear();
        for (status, expected) in statuses.iter().zip(std::mem::take(&mut self.expected)) {
            let Some((peer, bytes)) = expected else { continue };
            let mut count = 0;
            // SAFETY: the status comes from a completed receive.
            unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut count) };
            if count as usize != bytes {
                let (mine, theirs) = (format!("a receive of {bytes} bytes"), format!("a send of {count}"));
                return Err(CommError::Disagree { rank: link.group.rank() as usize, peer, mine, theirs });
            }
        }
        Ok(true)
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if !self.requests.is_empty() {
            std::mem::forget(std::mem::take(&mut self.tensors));
        }
    }
}

fn null_request() -> ffi::MPI_Request {
    // SAFETY: a constant of the MPI library, set before any code runs.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

fn byte_length(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

fn error_text(code: c_int) -> String {
    let mut text = [0; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer has the length that MPI asks for, and one zero behind it.
    unsafe {
        ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut length);
        CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned()
    }
}
