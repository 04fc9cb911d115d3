#!/usr/bin/env bash
# Every figure that the README speaks of: scripts/bench.sh NAME [OPTION…], options of the program in benches/ it calls.
# Where there is no cargo, TIEFSEE_PROGRAM names a `tiefsee` that was built elsewhere, TIEFSEE_BENCH_GPU kernels' bench_gpu.
#   gpu [forward] [wgrad] [grouped] [passes] [router] [attention] [sweep] [warm]   on one H100: our kernels, cuBLASLt beside each in
#                the same run, and then what a PyTorch user has (benches/rivals/gemm.py, passes_gpu.py); card and clocks are printed.
#                Products are timed after a second of rest, `warm`: after a second of the same, at the card's power limit
#   gpu-step     a training step of V3's widths on one H100, ours in BF16 and FP8 beside torchtitan's, compiled, in one run:
#                times, memory, and the kernels that the milliseconds go to
#   gpu-loss     a 150M model over 1050 steps of real text (--corpus DIR of `prepare --vocab 16384 --max-file-bytes 262144
#                --extensions` as in quickstart.sh: one long file of tables among the last steps decides them) in BF16, BF16
#                with other orders of sums, and FP8, each from three seeds (--seeds N): the gaps, and the first seed's curves in
#                runs/gpu-loss/loss.svg; with --ranks N 300 steps in FP8 on one GPU and, under mpirun, on N
#   multi-gpu    on all GPUs of a host (2, 4 or 8), under mpirun: the links by copy engine and over NCCL, and steps of V3's
#                widths under expert, data and pipeline parallelism beside torchtitan's, with what a trace says is hidden
#                [--only links,ep,dp,pp] [--no-rival] [--timeline FILE.svg] [--traces DIR]
#   train-cpu    our training step and transformers', same model, batch, threads and machine, in turn
#   parallel-cpu layouts of 1 to 8 ranks (threads): step time, bytes by axis, share of communication, peak memory,
#                MoE dispatch's bytes over their formula, and how much of the transfers a paired step hides
#   checkpoint   2 GB saved, loaded and the stall, beside raw I/O and torch.distributed.checkpoint on the same disk
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
        --ours "${CARGO_TARGET_DIR:-target}/release/tiefsee bench --config $config --steps 16 --set model.num_nextn_predict_layers=0 --set run.threads=$threads" \
        --rival ".deps/venv/bin/python benches/rivals/train_cpu.py $config --steps 16 --threads $threads" "$@"
    ;;
parallel-cpu)
    scripts/setup.sh
    cargo build --release --quiet -p trainer
    python3 benches/parallel.py --ours "${CARGO_TARGET_DIR:-target}/release/tiefsee bench --config configs/run/bench-parallel.toml" "$@"
    ;;
checkpoint)
    scripts/setup.sh
    scripts/test-venv.sh
    cargo build --release --quiet -p trainer --example bench_checkpoint
    .deps/venv/bin/python benches/checkpoint.py --ours "${CARGO_TARGET_DIR:-target}/release/examples/bench_checkpoint" \
        --rival ".deps/venv/bin/python benches/rivals/dcp.py" "$@"
    ;;
data | data-index | prepare)
    scripts/bench-corpus.sh
    cargo build --release --quiet -p data --examples
    what=${name#data-}
    .deps/bench-venv/bin/python benches/data.py "${what/#data/read}" "$@"
    ;;
gpu | gpu-step | gpu-loss | multi-gpu)
    python=${TIEFSEE_PYTHON:-python3} # one whose torch has CUDA; libtorch is taken from there
    torch=$("$python" -c 'import os, torch; assert torch.cuda.is_available(), "no GPU"; print(os.path.dirname(torch.__file__))')
    export LD_LIBRARY_PATH="$torch/lib:$(dirname "$torch")/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    clocks() { nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu --format=csv; }
    clocks
    # A machine with a GPU may have no Rust: a program built elsewhere can be named.
    if [ "$name" = gpu-step ]; then
        tiefsee=${TIEFSEE_PROGRAM:-"cargo run --release --quiet -p trainer --"}
        "$python" benches/gpu_step.py --ours "$tiefsee bench --gpu --config configs/run/bench-gpu.toml" \
            --rival "$python benches/rivals/step_gpu.py" "$@"
        clocks
        exit
    fi
    if [ "$name" = multi-gpu ]; then
        ranks=$("$python" -c 'import torch; print(torch.cuda.device_count())')
        . scripts/env.sh "$ranks"
        [ -n "${TIEFSEE_PROGRAM:-}" ] || cargo build --release --quiet -p trainer
        "$python" benches/multi_gpu.py --ranks "$ranks" --ours "${TIEFSEE_PROGRAM:-${CARGO_TARGET_DIR:-target}/release/tiefsee} bench" \
            --rival "$python -m torch.distributed.run --standalone --nproc-per-node {ranks} benches/rivals/step_multi.py" "$@"
        clocks
        exit
    fi
    if [ "$name" = gpu-loss ]; then
        . scripts/env.sh 8
        "$python" benches/loss_gpu.py --tiefsee "${TIEFSEE_PROGRAM:-"cargo run --release --quiet -p trainer --"}" --out runs/gpu-loss "$@"
        exit
    fi
    ours=${TIEFSEE_BENCH_GPU:-"cargo run --release --quiet -p kernels --example bench_gpu --"}
    $ours "$@"
    clocks
    "$python" benches/rivals/gemm.py
    "$python" benches/rivals/passes_gpu.py
    ;;
*)
    sed -n '2,/^set/p' "$0" | sed -n 's/^# //p' >&2
    exit 2
    ;;
esac
