//! The DeepSeek-V3 model as layers with an explicit forward and backward (DESIGN §3). Torch autograd never runs
//! here; it is the tests' oracle.
pub mod block;
pub mod config;
pub mod embedding;
pub mod experts;
pub mod flow;
pub mod gate;
pub mod gemms;
pub mod head;
pub mod hf;
pub mod kept;
pub mod layer;
pub mod linear;
pub mod mla;
pub mod mlp;
pub mod moe;
pub mod mtp;
pub mod norm;
pub mod operand;
pub mod params;
pub mod recompute;
pub mod saved;
pub mod sentinel;
pub mod stage;
pub mod swiglu;

pub use config::ModelConfig;
pub use layer::Layer;
pub use params::{ExpertShare, GradSink, Grads, ParamId, ParamTable, Weights};
pub use recompute::Recompute;
pub use sentinel::{Product, Sentinel};
pub use stage::{MicroBatch, Stage, StagePart, StageStats, StepContext};
