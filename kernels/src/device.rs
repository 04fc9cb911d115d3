//! The GPU of this process: its context, its compiled kernels, its memory. Everything is found at run time.
//!
//! Torch's CUDA half is loaded by name, so one binary serves machines with and without a GPU. A process drives one
//! GPU, opened once at start; ops find it through the device of their tensors. Torch runs on the null stream, and so
//! does every launch that names no other.
#![allow(unsafe_code)]
mod download;

pub use download::{Arrival, Downloads};

use crate::jit::{self, Jit, JitError, Source};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use tch::Device;

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("CUDA: {0}")]
    Driver(#[from] DriverError),
    #[error(transparent)]
    Jit(#[from] JitError),
    #[error("GPU {asked} was asked for, and this process drives GPU {open}")]
    AnotherGpu { asked: usize, open: usize },
    #[error("{0}: its compute capability is {1}.{2}, the kernels need an H100-class GPU's, 9.0")]
    Capability(String, i32, i32),
}

/// Where things lie. Absent paths are searched for where the loader looks and beside libtorch.
pub struct Options {
    /// This process among those of its host: they take its GPUs in turn, and share them where they are more.
    pub local_rank: usize,
    pub torch_cuda: Option<PathBuf>,
    pub nvrtc_folder: Option<PathBuf>,
    pub kernel_cache: PathBuf,
    /// Multiprocessors that kernels which fill the GPU leave to others', NCCL's.
    pub spared_sms: usize,
}

/// What `open` found.
pub enum Found {
    Gpu(&'static Gpu),
    /// No GPU here, and why: the caller says so and goes on with the CPU.
    Cpu(String),
}

pub struct Gpu {
    index: usize,
    context: Arc<CudaContext>,
    jit: Jit,
    name: String,
    num_sms: usize,
    kernels: Mutex<HashMap<String, Arc<Kernel>>>,
}

/// Set once by `open`, never changed: the kernels inside are a memo of their sources.
static GPU: OnceLock<Gpu> = OnceLock::new();

/// A loaded function. Loading is eager (CUDA's lazy loading can stall behind a stream that waits for a peer).
pub struct Kernel {
    pub(crate) name: String,
    pub(crate) function: sys::CUfunction,
    /// Sizes of the parameters as compiled: a launch is held to them.
    pub(crate) param_bytes: Vec<usize>,
    pub num_regs: i32,
    pub local_bytes: i32,
}

// SAFETY: a CUfunction may be launched from any thread; the module behind it is never unloaded.
unsafe impl Send for Kernel {}
// SAFETY: as above; nothing in it changes after loading.
unsafe impl Sync for Kernel {}

/// Device memory as the driver sees it: what torch's allocator keeps in its cache counts as used.
#[derive(Clone, Copy, Debug)]
pub struct MemoryStats {
    pub free_bytes: usize,
    pub total_bytes: usize,
}

/// Where on the PCI bus the GPU is that CUDA shows this process as `index`; absent without one. Needs no torch.
pub fn bus_id(index: usize) -> Option<String> {
    let mut id = [0; 16];
    // SAFETY: libcuda is there before it is called; `id` is a place of the length said.
    unsafe {
        if !sys::is_culib_present() || sys::cuInit(0).result().is_err() {
            return None;
        }
        let device = result::device::get(index as i32).ok()?;
        sys::cuDeviceGetPCIBusId(id.as_mut_ptr(), id.len() as i32, device).result().ok()?;
        Some(std::ffi::CStr::from_ptr(id.as_ptr()).to_string_lossy().into_owned())
    }
}

/// How many hardware queues CUDA takes.
pub const QUEUES: &str = "CUDA_DEVICE_MAX_CONNECTIONS";

/// Gives CUDA as many hardware queues as it has: with fewer, a stream that waits for a peer may stand before another's work.
/// Call it first in `main`, before there is a second thread.
pub fn many_queues() {
    // SAFETY: no other thread reads the environment, as the caller sees to.
    unsafe { std::env::set_var(QUEUES, "32") };
}

/// Finds the GPU, or says why there is none. An error is a GPU that is there but cannot be used.
pub fn open(options: &Options) -> Result<Found, DeviceError> {
    if let Some(gpu) = GPU.get() {
        let (asked, open) = (options.local_rank % tch::Cuda::device_count() as usize, gpu.index);
        return if asked == open { Ok(Found::Gpu(gpu)) } else { Err(DeviceError::AnotherGpu { asked, open }) };
    }
    // SAFETY: only asks the loader whether libcuda can be opened.
    if !unsafe { sys::is_culib_present() } {
        return Ok(Found::Cpu("no CUDA driver: the loader finds no libcuda.so.1".into()));
    }
    if let Err(why) = load_torch_cuda(options) {
        return Ok(Found::Cpu(why));
    }
    let count = tch::Cuda::device_count() as usize;
    if count == 0 {
        return Ok(Found::Cpu("libtorch_cuda.so is loaded, and sees no GPU (nvidia-smi says what the driver sees)".into()));
    }
    let index = options.local_rank % count;
    let context = CudaContext::new(index)?;
    let jit = Jit::load(options.nvrtc_folder.as_deref(), &options.kernel_cache)?;
    let name = context.name()?;
    use sys::CUdevice_attribute::*;
    let (major, minor) = (
        context.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        context.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if (major, minor) != (9, 0) {
        return Err(DeviceError::Capability(name, major, minor));
    }
    let num_sms = context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize - options.spared_sms;
    let gpu = Gpu { index, context, jit, name, num_sms, kernels: Mutex::default() };
    Ok(Found::Gpu(GPU.get_or_init(|| gpu)))
}

/// The GPU that holds a tensor on `device`. A tensor on a GPU that nobody opened is a bug.
pub fn gpu(device: Device) -> &'static Gpu {
    let gpu = GPU.get().expect("a CUDA tensor before device::open");
    assert_eq!(device, gpu.device(), "a tensor of another GPU");
    gpu
}

/// Where it was looked for, and why each place did not do.
fn load_torch_cuda(options: &Options) -> Result<(), String> {
    // Before any question to torch about CUDA: it remembers the first answer.
    let name = "libtorch_cuda.so";
    let beside = jit::folder_of_loaded("libtorch_cpu.so").unwrap_or_default().join(name);
    let mut tried = String::new();
    for path in options.torch_cuda.clone().into_iter().chain([PathBuf::from(name), beside]) {
        match jit::open(&path) {
            Ok(library) => {
                std::mem::forget(library); // its code backs every CUDA tensor until the process ends
                return Ok(());
            }
            Err(why) => tried += &format!("\n  {}: {why}", path.display()),
        }
    }
    Err(format!("libtorch_cuda.so cannot be loaded (it needs CUDA's libraries, which a plain `pip install torch` brings):{tried}"))
}

impl Gpu {
    pub fn device(&self) -> Device {
        Device::Cuda(self.index)
    }
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Multiprocessors that a kernel may fill.
    pub fn num_sms(&self) -> usize {
        self.num_sms
    }
    /// The null stream, where torch works.
    pub fn default_stream(&self) -> Arc<CudaStream> {
        self.context.default_stream()
    }
    /// A stream that the null stream does not wait for: order the two by events.
    pub fn new_stream(&self) -> Result<Arc<CudaStream>, DeviceError> {
        Ok(self.context.new_stream()?)
    }
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(self.context.synchronize()?)
    }
    pub(crate) fn bind(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()
    }
    pub fn memory(&self) -> Result<MemoryStats, DeviceError> {
        self.bind()?;
        let (free_bytes, total_bytes) = result::mem_get_info()?;
        Ok(MemoryStats { free_bytes, total_bytes })
    }

    /// Milliseconds on the device for what `work` puts on the null stream.
    pub fn time_ms(&self, work: impl FnOnce()) -> Result<f32, DeviceError> {
        let stream = self.default_stream();
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let start = stream.record_event(timed)?;
        work();
        let end = stream.record_event(timed)?;
        Ok(start.elapsed_ms(&end)?)
    }

    /// The function `entry` of `source()`, compiled or read from the cache on first use. `key` stands for the source.
    pub fn kernel(
        &self,
        key: &str,
        entry: &str,
        source: impl FnOnce() -> Source,
    ) -> Result<Arc<Kernel>, DeviceError> {
        let key = format!("{key}/{entry}");
        if let Some(kernel) = self.kernels.lock().expect("no kernel load panics").get(&key) {
            return Ok(kernel.clone());
        }
        let cubin = self.jit.cubin(&source())?;
        let kernel = Arc::new(self.load(&cubin, entry)?);
        self.kernels.lock().expect("no kernel load panics").insert(key, kernel.clone());
        Ok(kernel)
    }

    fn load(&self, cubin: &[u8], entry: &str) -> Result<Kernel, DeviceError> {
        use sys::CUfunction_attribute_enum::*;
        self.bind()?;
        let name = CString::new(entry).expect("an entry has no zero byte");
        // SAFETY: a whole cubin of our own compiler; the module is never unloaded, so the function stays valid. All
        // shared memory of an SM beside the static part may be asked for by a launch.
        unsafe {
            let module = result::module::load_data(cubin.as_ptr().cast())?;
            let function = result::module::get_function(module, name)?;
            let attribute = |a| result::function::get_function_attribute(function, a);
            let most = self.context.attribute(
                sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?;
            let fixed = attribute(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
            let dynamic = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            result::function::set_function_attribute(function, dynamic, most - fixed)?;
            let mut param_bytes = Vec::new();
            let (mut offset, mut size) = (0, 0);
            while sys::cuFuncGetParamInfo(function, param_bytes.len(), &mut offset, &mut size).result().is_ok() {
                param_bytes.push(size);
            }
            Ok(Kernel {
                name: entry.to_string(),
                function,
                param_bytes,
                num_regs: attribute(CU_FUNC_ATTRIBUTE_NUM_REGS)?,
                local_bytes: attribute(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            })
        }
    }
}
