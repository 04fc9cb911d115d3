#!/usr/bin/env bash
# Every figure that the README quotes: scripts/bench.sh NAME [--json FILE] [--rounds N] [--threads N]
#   gpu [forward] [wgrad] [grouped] [passes] [sweep]   on one H100: our kernels, cuBLASLt beside each in the same run,
#                and then what a PyTorch user has (benches/rivals/gemm.py, passes_gpu.py); card and clocks are printed
#   train-cpu    our training step and transformers', same model, batch, threads and machine, in turn
#   data         packed samples read: ours, a Megatron-style mmap, MosaicML streaming, Hugging Face datasets
#   data-index   a 14.8T-token source opened and searched, and a tenth, a hundredth, a thousandth of it
#   prepare      text to shards with a 128K tokenizer beside the encoder alone; ids against Hugging Face tokenizers
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
data | data-index | prepare)
    scripts/bench-corpus.sh
    cargo build --release --quiet -p data --examples
    what=${name#data-}
    .deps/bench-venv/bin/python benches/data.py "${what/#data/read}" "$@"
    ;;
*)
    sed -n '2,/^set/p' "$0" | sed -n 's/^# //p' >&2
    exit 2
    ;;
esac
