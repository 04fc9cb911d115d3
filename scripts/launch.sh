#!/usr/bin/env bash
# Starts a run on every rank, watches and restarts it: scripts/launch.sh [OPTIONS] -- train --config FILE | resume RUN_DIR
# All options: scripts/launch.sh --help
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
exec "${CARGO_TARGET_DIR:-$here/target}/release/tiefsee-launch" "$@"
