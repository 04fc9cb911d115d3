#!/usr/bin/env bash
# Every figure that the README quotes: scripts/bench.sh NAME [--json FILE] [--rounds N] [--threads N]
#   train-cpu    our training step and transformers', same model, batch, threads and machine, in turn
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-}
[ $# -gt 0 ] && shift
threads=$(nproc)
for ((i = 1; i <= $#; i++)); do
    if [ "${!i}" = --threads ]; then next=$((i + 1)) && threads=${!next}; fi
done

case "$name" in
train-cpu)
    scripts/setup.sh
    scripts/test-venv.sh
    cargo build --release --quiet
    config=configs/run/bench-cpu.toml
    # transformers trains neither MTP nor a balance loss.
    .deps/venv/bin/python benches/compare.py "$name" --config "$config" \
        --ours "target/release/tiefsee bench --config $config --steps 16 --set model.num_nextn_predict_layers=0 --set run.threads=$threads" \
        --rival ".deps/venv/bin/python benches/rivals/train_cpu.py $config --steps 16 --threads $threads" "$@"
    ;;
*)
    sed -n '2,3p' "$0" | sed 's/^# //' >&2
    exit 2
    ;;
esac
