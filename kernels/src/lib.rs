//! What runs on a device: the ops between the GEMMs, the GEMMs, and their CPU references.
pub mod device;
pub mod fp8;
pub mod jit;
pub mod launch;
pub mod ops;
mod precision;
mod sass;
pub mod shim;
pub use precision::Precision;
