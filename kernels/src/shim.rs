//! What tch has no call for, through a few lines of C++ (`shim/shim.cpp`, built against libtorch's headers): attention
//! that returns its log-sum-exp, tensors in memory of another's, what torch's allocator holds, and a trace of what a GPU does.
#![allow(unsafe_code)]
mod host;

pub use host::{bytes, bytes_mut};

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use tch::{Device, Tensor};
use torch_sys::C_tensor;

#[derive(Debug, thiserror::Error)]
#[error("libtorch: {0}")]
pub struct TorchError(String);

unsafe extern "C" {
    fn tiefsee_cudnn_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        causal: bool,
        scale: f64,
        out: *mut *mut C_tensor,
    ) -> *const c_char;
    fn tiefsee_wrap(
        data: *mut c_void,
        bytes: i64,
        device: c_int,
        owner: *mut c_void,
        drop: extern "C" fn(*mut c_void),
        out: *mut *mut C_tensor,
    ) -> *const c_char;
    fn tiefsee_empty_cache() -> *const c_char;
    fn tiefsee_memory(device: c_int, bytes: *mut i64) -> *const c_char;
    fn tiefsee_reset_peak(device: c_int) -> *const c_char;
    fn tiefsee_profile_start() -> *const c_char;
    fn tiefsee_profile_stop(path: *const c_char) -> *const c_char;
}

/// Bytes that torch's allocator has given out and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub allocated: i64,
    /// The most since the start or the last `reset_peak`.
    pub peak: i64,
    /// Taken from the device, given out or kept for later.
    pub reserved: i64,
}

/// What the backward needs beside q, k, v.
pub struct CudnnAttention {
    pub out: Tensor, // [B, H, S, Dv]
    pub log_sum_exp: Tensor, // [B, H, S, 1], FP32
}

fn check(error: *const c_char) -> Result<(), TorchError> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: a zero-terminated text that lives until this thread's next call.
    Err(TorchError(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned()))
}

/// cuDNN's causal attention: q, k [B, H, S, Dk], v [B, H, S, Dv], BF16 on a GPU, the last dim contiguous.
pub fn cudnn_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<CudnnAttention, TorchError> {
    let mut made = [std::ptr::null_mut(); 2];
    // SAFETY: three live tensors, and places for two.
    check(unsafe { tiefsee_cudnn_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), true, scale, made.as_mut_ptr()) })?;
    // SAFETY: each was made for us with new, as tch's own are; nobody else frees it.
    let [out, log_sum_exp] = made.map(|tensor| unsafe { Tensor::from_ptr(tensor) });
    Ok(CudnnAttention { out, log_sum_exp })
}

fn index(device: Device) -> c_int {
    let Device::Cuda(index) = device else { panic!("{device:?} is not a GPU's allocator") };
    index as c_int
}

/// Called once, from whichever thread drops last.
type Owner = Box<dyn FnOnce() + Send>;

extern "C" fn release(owner: *mut c_void) {
    // SAFETY: made by `wrap`, whose tensor's storage calls this once.
    let gone = unsafe { Box::from_raw(owner.cast::<Owner>()) };
    gone();
}

/// Bytes [N] in memory that torch did not allocate. `gone` is called when no tensor has them any more.
///
/// # Safety
/// So many bytes of `device` at `data`, for which nobody else has a use until `gone` is called.
pub unsafe fn wrap(data: *mut c_void, bytes: usize, device: Device, gone: impl FnOnce() + Send + 'static) -> Result<Tensor, TorchError> {
    let owner: Box<Owner> = Box::new(Box::new(gone));
    let (device, mut made) = (if device == Device::Cpu { -1 } else { index(device) }, std::ptr::null_mut());
    // SAFETY: the memory is as the caller promises, the owner is handed over, and a place for one tensor, which is ours.
    unsafe {
        check(tiefsee_wrap(data, bytes as i64, device, Box::into_raw(owner).cast(), release, &mut made))?;
        Ok(Tensor::from_ptr(made))
    }
}

/// What torch keeps of GPU memory for later goes back to the driver. Waits for the GPU.
pub fn empty_cache() -> Result<(), TorchError> {
    // SAFETY: nothing goes in.
    check(unsafe { tiefsee_empty_cache() })
}

/// Of torch's allocator on a GPU.
pub fn memory(device: Device) -> Result<Memory, TorchError> {
    let mut bytes = [0; 3];
    // SAFETY: a place for three numbers.
    check(unsafe { tiefsee_memory(index(device), bytes.as_mut_ptr()) })?;
    let [allocated, peak, reserved] = bytes;
    Ok(Memory { allocated, peak, reserved })
}

/// The peak is counted from now on.
pub fn reset_peak(device: Device) -> Result<(), TorchError> {
    // SAFETY: only numbers go in.
    check(unsafe { tiefsee_reset_peak(index(device)) })
}

/// Runs `work` and writes what the GPU did meanwhile to `path`, as a Chrome trace. `work` ends with a synchronisation.
pub fn profile<R>(path: &Path, work: impl FnOnce() -> R) -> Result<R, TorchError> {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path has no zero byte");
    // SAFETY: nothing goes in.
    check(unsafe { tiefsee_profile_start() })?;
    let result = work();
    // SAFETY: a zero-terminated path.
    check(unsafe { tiefsee_profile_stop(path.as_ptr()) })?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tch::Kind;

    #[test]
    fn memory_of_anothers_is_his_again_when_the_last_tensor_there_is_gone() {
        let (mut memory, held) = (vec![0.0_f32; 6], Arc::new(()));
        let with = held.clone();
        // SAFETY: the vector's bytes, which nobody touches before the tensors are gone.
        let bytes = unsafe { wrap(memory.as_mut_ptr().cast(), 24, Device::Cpu, move || drop(with)) }.expect("a tensor");
        let mut row = bytes.view_dtype(Kind::Float).view([2, 3]).get(1);
        drop(bytes);
        row.copy_(&Tensor::from_slice(&[1.0_f32, 2.0, 3.0]));
        assert_eq!(Arc::strong_count(&held), 2);
        drop(row);
        assert_eq!((Arc::strong_count(&held), memory), (1, vec![0.0, 0.0, 0.0, 1.0, 2.0, 3.0]));
    }
}
