#!/usr/bin/env bash
# Runs a command with the tests' Open MPI 5 (.deps/venv has it) in place of the installed one: scripts/open-mpi-5.sh COMMAND…
# What it runs is built before: its mpicc is 5's, too.
set -euo pipefail
venv=$(cd "$(dirname "$0")/.." && pwd)/.deps/venv
export PATH="$venv/bin:$PATH" LD_LIBRARY_PATH="$venv/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
mpirun --version | grep -F '(Open MPI) 5.' || { echo "open-mpi-5: $venv has none: scripts/test-venv.sh" >&2; exit 1; }
exec "$@"
