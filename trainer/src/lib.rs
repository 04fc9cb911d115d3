//! One training run: config, coordinator, step, optimizer, checkpoint, metrics. Holds no maths of a layer.
pub mod balance;
pub mod checkpoint;
pub mod checks;
pub mod config;
pub mod coordinator;
pub mod device;
pub mod ema;
pub mod estimate;
pub mod faults;
pub mod guard;
pub mod memory;
pub mod metrics;
pub mod optimizer;
pub mod phase;
pub mod pipeline;
pub mod run;
pub mod state;
pub mod sentinel;
pub mod step;
pub mod summary;
pub mod validate;
pub mod waiting;
pub mod zero;

pub use config::RunConfig;
pub use run::{Outcome, train};
