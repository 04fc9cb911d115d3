#!/usr/bin/env bash
# All tests: set-up, the oracles' Python, clippy with warnings denied, every test of the workspace. Arguments go to cargo test.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
scripts/test-venv.sh
. scripts/env.sh 4
cargo build --release --workspace
cargo clippy --release --workspace --all-targets -- -D warnings
cargo test --release --workspace "$@"
[ $# = 0 ] || exit 0
# Open MPI 5, whose mpirun is another program: what starts, watches and restarts ranks, and real runs of it.
# --workspace: with fewer crates cargo would build dependencies anew.
scripts/open-mpi-5.sh cargo test --release --workspace --test launcher
scripts/open-mpi-5.sh cargo test --release --workspace --lib -- launching::a_killed_rank launching::two_ranks launching::a_cut_link launching::a_link_cut launching::nodes_that_meet runs::a_stop_signal
