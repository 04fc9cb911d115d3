#!/usr/bin/env bash
# Random kills of ranks, hosts (network namespaces) and launchers, also in the middle of a save, over one run; then its
# losses, samples, weights and moments against the undisturbed run, bit for bit:
#   scripts/chaos.sh [--kills N] [--seed S] [--second-tier]     --second-tier: with copies of every step on both hosts
# 100 kills take about a quarter of an hour. Needs root. The test is tests/src/chaos.rs; scripts/test.sh runs it short.
set -euo pipefail
cd "$(dirname "$0")/.."
export CHAOS_KILLS=100 CHAOS_SEED=1
while [ $# -gt 0 ]; do
    case $1 in
    --kills) CHAOS_KILLS=$2 && shift 2 ;;
    --seed) CHAOS_SEED=$2 && shift 2 ;;
    --second-tier) export CHAOS_SECOND_TIER=1 && shift ;;
    *) sed -n '2,5s/^# *//p' "$0" >&2 && exit 2 ;;
    esac
done
. scripts/env.sh 4
# As scripts/test.sh builds them: nothing is built twice.
cargo build --release --workspace
cargo test --release --workspace chaos:: -- --nocapture
