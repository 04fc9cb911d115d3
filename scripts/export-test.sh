#!/usr/bin/env bash
# The FP8 export of a run's newest checkpoint against our own quantiser and transformers' loader: scripts/export-test.sh [RUN_DIR]
# RUN_DIR is scripts/quickstart.sh's run by default. The test is tests/src/export.rs.
set -euo pipefail
cd "$(dirname "$0")/.."
export EXPORT_RUN=${1:-runs/quickstart}
ls "$EXPORT_RUN"/checkpoints/step-* >/dev/null
scripts/test-venv.sh
# As scripts/test.sh builds them: nothing is built twice.
cargo build --release --workspace
cargo test --release --workspace export::an_fp8_export -- --nocapture
