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
