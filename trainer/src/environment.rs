//! The one place that reads the environment.
use std::env;

/// Started by mpirun or srun, which name a rank; otherwise the process is a world of its own.
pub fn launched_by_mpi() -> bool {
    ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"].iter().any(|name| env::var_os(name).is_some())
}

/// Ranks of this world on this machine.
pub fn ranks_here() -> usize {
    let count = |name| env::var(name).ok().and_then(|value| value.parse().ok());
    count("OMPI_COMM_WORLD_LOCAL_SIZE").or_else(|| count("MPI_LOCALNRANKS")).unwrap_or(1)
}

/// The user has said how many hardware queues CUDA is to take.
pub fn names_queues() -> bool {
    env::var_os(kernels::device::QUEUES).is_some()
}
