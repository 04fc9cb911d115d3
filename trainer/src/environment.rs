//! The one place that reads the environment.
use std::env;

/// What mpirun or srun name a rank by.
const RANK: [&str; 3] = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"];

/// Started by one of them; otherwise the process is a world of its own.
pub fn launched_by_mpi() -> bool {
    RANK.iter().any(|name| env::var_os(name).is_some())
}

/// Rank 0, before MPI is asked.
pub fn is_first_rank() -> bool {
    RANK.iter().find_map(|name| env::var(name).ok()).is_none_or(|rank| rank == "0")
}

/// How many hardware queues CUDA is to take, where the environment says so.
pub fn queues() -> Option<String> {
    env::var_os(kernels::device::QUEUES).map(|value| value.to_string_lossy().into_owned())
}
