# Sourced by the scripts that start mpirun: what Open MPI needs as root, on machines of few cores, and for ranks of several threads.
#   . scripts/env.sh [RANKS]
# Variables that are already set are left alone.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# By itself mpirun binds each of two ranks to one core, and starts no more ranks than there are cores, whose threads it does
# not count.
export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy:-none}"
export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe:-1}"
# The same for the mpirun of Open MPI 5.
export PRTE_MCA_hwloc_default_binding_policy="${PRTE_MCA_hwloc_default_binding_policy:-none}"
export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}"
# With fewer cores than ranks (+1: mpirun and the loader want one too) a rank that spins for a message keeps its peer from
# sending it: yield instead.
if [ "$(nproc)" -le "${1:-2}" ]; then
    export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}"
fi
