//! Starts, watches and restarts the ranks of a run: torchrun's habits over mpirun and srun. A leaf, without libtorch.
