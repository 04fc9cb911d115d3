//! Starts, watches and restarts the ranks of a run: torchrun's habits over mpirun and srun. A leaf, without libtorch.
//!
//! Processes, outermost first; each ends when the one before it dies, however that died:
//!
//! ```text
//! tiefsee-launch        supervise.rs: starts attempts, watches steps, restarts, exits with a code that means something
//!  └ guard              guard.rs: own session; a pipe from the launcher, whose end of file means "end everything"
//!     └ mpirun | srun   command.rs: tied to the guard by a parent-death signal
//!        └ ranks        rank.rs: tied to mpirun or orted likewise
//!           └ beat      heartbeat.rs: one a host; ends the host's ranks when the launcher is out of reach
//! ```
//!
//! Without ssh, launchers of other nodes run mpirun's daemons: rendezvous.rs on node 0, serve.rs on the others, over the
//! authenticated connections of gate.rs and wire.rs.
pub mod args;
pub mod binding;
pub mod command;
pub mod ending;
pub mod environment;
pub mod gate;
pub mod guard;
pub mod heartbeat;
pub mod hosts;
pub mod incidents;
pub mod layout;
pub mod locks;
pub mod lookout;
pub mod outcome;
pub mod output;
pub mod processes;
pub mod program;
pub mod progress;
pub mod rank;
pub mod remote;
pub mod rendezvous;
pub mod run_dir;
pub mod serve;
pub mod supervise;
pub mod waits;
pub mod wire;
pub mod work;
