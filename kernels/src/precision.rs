//! The precision of a run (DESIGN §5): one word in the config decides every tensor's kind.
use serde::{Deserialize, Serialize};
use tch::Kind;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Everything in f64: tells a mistake from rounding.
    F64,
    /// The reference.
    F32,
    /// BF16 weights and activations, FP32 masters, sums and gate.
    Bf16,
    /// BF16, with the three GEMMs of every linear and expert in FP8 (`fp8`).
    Fp8,
}

impl Precision {
    /// Weights and activations.
    pub fn compute(self) -> Kind {
        match self {
            Precision::F64 => Kind::Double,
            Precision::F32 => Kind::Float,
            Precision::Bf16 | Precision::Fp8 => Kind::BFloat16,
        }
    }
    /// Masters, accumulated gradients, the gate and the losses.
    pub fn master(self) -> Kind {
        if self == Precision::F64 { Kind::Double } else { Kind::Float }
    }
}
