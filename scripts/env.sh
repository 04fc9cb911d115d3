# Sourced by the scripts that start mpirun: what Open MPI needs as root, and where ranks outnumber cores.
#   . scripts/env.sh [RANKS]
# Variables that are already set are left alone.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# With fewer cores than ranks (+1: mpirun and the loader want one too) a rank that spins for a message keeps its peer from
# sending it: yield instead, and bind nobody to a core.
if [ "$(nproc)" -le "${1:-2}" ]; then
    export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}"
    export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy:-none}"
    export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe:-1}"
fi
