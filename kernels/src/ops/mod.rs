//! One module an op: a host entry that asserts shapes, and the CPU reference every device is held to.
pub mod adamw;
pub mod attention;
pub mod checksum;
pub mod cross_entropy;
pub mod embedding;
pub mod gate;
pub mod gemm_fp8;
pub mod gemm_grouped;
pub mod gradient_norm;
pub mod linear;
pub mod mla_heads;
pub mod normal;
pub mod quantise;
pub mod rms_norm;
pub mod rope;
pub mod routes;
pub mod swiglu;
pub mod unpermute;
pub mod wide_linear;

use tch::Kind;

/// The kind that statistics and sums are taken in: FP32, or f64 where the run is f64.
pub fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}
