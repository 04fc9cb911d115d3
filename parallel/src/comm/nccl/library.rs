//! NCCL's functions, looked up at run time, and the types it takes.
use super::super::{CommError, Reduce};
use cudarc::nccl::sys;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use tch::Kind;

pub type Code = c_int;
pub const SUCCESS: Code = 0;
pub const IN_PROGRESS: Code = 7;

/// NCCL's functions. cudarc's own loader never tries the name `libnccl.so.2`, and reads a result code that it
/// does not know as an enum; so these are looked up here, with its types and plain integers for codes.
pub struct Library {
    pub version: unsafe extern "C" fn(*mut c_int) -> Code,
    pub unique_id: unsafe extern "C" fn(*mut sys::ncclUniqueId) -> Code,
    pub init: unsafe extern "C" fn(*mut sys::ncclComm_t, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> Code,
    pub finalize: unsafe extern "C" fn(sys::ncclComm_t) -> Code,
    pub destroy: unsafe extern "C" fn(sys::ncclComm_t) -> Code,
    pub abort: unsafe extern "C" fn(sys::ncclComm_t) -> Code,
    pub async_error: unsafe extern "C" fn(sys::ncclComm_t, *mut Code) -> Code,
    pub last_error: unsafe extern "C" fn(sys::ncclComm_t) -> *const c_char,
    pub group_start: unsafe extern "C" fn() -> Code,
    pub group_end: unsafe extern "C" fn() -> Code,
    pub send: unsafe extern "C" fn(*const c_void, usize, u32, c_int, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    pub recv: unsafe extern "C" fn(*mut c_void, usize, u32, c_int, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    pub all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    pub broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, c_int, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    pub all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, u32, sys::ncclComm_t, sys::cudaStream_t) -> Code,
    pub reduce_scatter: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, u32, sys::ncclComm_t, sys::cudaStream_t) -> Code,
}

impl Library {
    /// `path`: absent as the loader finds it.
    pub fn load(path: Option<&Path>) -> Result<Self, CommError> {
        let path = path.unwrap_or(Path::new("libnccl.so.2"));
        let refuse = |e: libloading::Error| CommError::Unsupported { op: "connect", reason: format!("{}: {e}", path.display()) };
        // SAFETY: NCCL's initialisers have no preconditions; the signatures are those of nccl.h 2.28.
        unsafe {
            let library = libloading::Library::new(path).map_err(refuse)?;
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

    pub fn error_text(&self) -> String {
        // SAFETY: takes a null communicator; gives a zero-ended text that stays NCCL's.
        unsafe {
            let text = (self.last_error)(std::ptr::null_mut());
            if text.is_null() { "NCCL gives no reason".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        }
    }
}

/// What is only moved is moved as bytes: NCCL need not know FP8.
pub const BYTE: u32 = sys::ncclDataType_t::ncclUint8 as u32;

pub fn data_type(op: &'static str, kind: Kind) -> Result<u32, CommError> {
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

pub fn reduction(reduce: Reduce) -> u32 {
    use sys::ncclRedOp_t::*;
    (match reduce {
        Reduce::Sum => ncclSum,
        Reduce::Max => ncclMax,
        Reduce::Min => ncclMin,
    }) as u32
}
