//! Copies to the host beside what the null stream does next.
use super::{DeviceError, Gpu};
use cudarc::driver::{CudaEvent, CudaStream, DriverError, result};
use std::sync::Arc;
use tch::Tensor;

/// A stream for copies, which hold up nothing.
pub struct Downloads {
    gpu: &'static Gpu,
    stream: Arc<CudaStream>,
}

/// Copies under way.
pub struct Arrival(CudaEvent);

impl Downloads {
    pub fn new(gpu: &'static Gpu) -> Result<Downloads, DeviceError> {
        Ok(Downloads { gpu, stream: gpu.new_stream()? })
    }

    /// What each `from` is when the null stream has come to here, into `to` on the host, pinned, of the same kind and length.
    /// Until it has arrived nobody changes `from` (`hold_back`), or looks at `to` (`wait`); both live on.
    pub fn begin<'a>(&self, pairs: impl IntoIterator<Item = (&'a Tensor, &'a mut Tensor)>) -> Result<Arrival, DeviceError> {
        self.stream.wait(&self.gpu.default_stream().record_event(None)?)?;
        for (from, to) in pairs {
            assert!(from.device() == self.gpu.device() && from.is_contiguous() && from.kind() == to.kind() && from.numel() == to.numel());
            let place = crate::shim::bytes_mut(to).expect("in a row, on the host");
            // SAFETY: a live tensor of this GPU, of as many bytes; the caller keeps both and keeps off.
            unsafe { result::memcpy_dtoh_async(place, from.data_ptr() as u64, self.stream.cu_stream()) }?;
        }
        Ok(Arrival(self.stream.record_event(None)?))
    }

    /// What the null stream is given from here on comes after the copies; no host waits.
    pub fn hold_back(&self, arrival: &Arrival) -> Result<(), DriverError> {
        self.gpu.default_stream().wait(&arrival.0)
    }
}

impl Arrival {
    /// From any thread.
    pub fn wait(&self) -> Result<(), DriverError> {
        self.0.synchronize()
    }
}
