//! Starts, watches and restarts the ranks of a run: torchrun's habits over mpirun and srun. A leaf, without libtorch.
//!
//! Processes, outermost first; each ends when the one before it dies, however that died:
//!
//! ```text
//! tiefsee-launch        supervise.rs: starts attempts, watches steps, restarts, exits with a code that means something
//!  └ guard              guard.rs: own session; a pipe from the launcher, whose end of file means "end everything"
//!     └ mpirun | srun   command.rs: tied to the guard by a parent-death signal
//!        └ ranks        tied to mpirun or orted likewise
//! ```
pub mod args;
pub mod command;
pub mod environment;
pub mod guard;
pub mod incidents;
pub mod outcome;
pub mod output;
pub mod processes;
pub mod program;
pub mod progress;
pub mod run_dir;
pub mod supervise;
