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

/// Ranks of this world on this machine.
pub fn ranks_here() -> usize {
    let count = |name| env::var(name).ok().and_then(|value| value.parse().ok());
    let of_srun = || env::var_os("PMIX_RANK").and(env::var("SLURM_STEP_TASKS_PER_NODE").ok()).and_then(|tasks| tasks_of(&tasks, count("SLURM_NODEID")?));
    count("OMPI_COMM_WORLD_LOCAL_SIZE").or_else(|| count("MPI_LOCALNRANKS")).or_else(of_srun).unwrap_or(1)
}

/// Of SLURM's "4(x2),3", what the node of that number has.
fn tasks_of(list: &str, node: usize) -> Option<usize> {
    let nodes = list.split(',').flat_map(|part| {
        let (tasks, times) = part.split_once("(x").unwrap_or((part, "1"));
        std::iter::repeat_n(tasks.parse().ok(), times.trim_end_matches(')').parse().unwrap_or(1))
    });
    nodes.into_iter().nth(node).flatten()
}

/// How many hardware queues CUDA is to take, where the environment says so.
pub fn queues() -> Option<String> {
    env::var_os(kernels::device::QUEUES).map(|value| value.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::tasks_of;

    #[test]
    fn a_node_s_tasks_are_read_as_slurm_lists_them() {
        assert_eq!([0, 1, 2, 3].map(|node| tasks_of("4(x2),3", node)), [Some(4), Some(4), Some(3), None]);
        assert_eq!(tasks_of("8", 0), Some(8));
    }
}
