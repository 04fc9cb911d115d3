#!/usr/bin/env bash
# The whole line once: set-up, build, corpus, a run on 2 ranks that is stopped in the middle and resumed, a summary.
#   scripts/quickstart.sh [--short] [FOLDER…]
# The text is the sources of this project's own dependencies, and any folders named. --short: fewer steps, for CI.
# corpus/quickstart and runs/quickstart are this script's own: a second run makes them afresh.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart
corpus=corpus/quickstart
max_bytes=32000000
least=0.7 # nats that the held-out loss must end below the unigram entropy
stop_after=100 # steps
settings=(--set "run.dir=$run")
folders=()
for argument in "$@"; do
    case "$argument" in
    --short)
        max_bytes=8000000
        least=0.2
        stop_after=20
        settings+=(--set phase.0.tokens=20480 --set phase.1.tokens=204800 --set validation.every=20)
        ;;
    -*) sed -n '2,5p' "$0" | sed 's/^# //' >&2 && exit 2 ;;
    *) [ -e "$argument" ] && folders+=("$argument") || { echo "quickstart: no such folder: $argument" >&2 && exit 1; } ;;
    esac
done
say() { echo "quickstart: $*"; }
fail() { echo "quickstart: error: $*" >&2; exit 1; }

# The program finds libtorch from where it lies, with .cargo/config.toml's flags.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
export CARGO_TARGET_DIR=$PWD/target
scripts/setup.sh
cargo build --release
. scripts/env.sh 2
started=$SECONDS

# Sources of the registry's crates, as cargo has them here; the folders named come first.
mapfile -t sources < <(cargo metadata --format-version 1 --locked --offline --filter-platform "$(rustc -vV | sed -n "s/^host: //p")" |
    python3 -c 'import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["source"]: print(os.path.dirname(package["manifest_path"]))')
[ ${#sources[@]} -gt 0 ] || fail "cargo metadata names no sources"
# Prose and code; the parquet and jsonl files among those sources are tests' data.
extensions=txt,md,rst,adoc,rs,c,h,cc,cpp,hpp,py,go,java,js,ts,sh,sql,tex
rm -rf "$corpus" "$corpus.partial" "$run"
say "corpus from ${#sources[@]} dependencies' sources${folders[*]:+ and ${folders[*]}}, at most $((max_bytes / 1000000)) MB"
target/release/tiefsee prepare "${folders[@]}" "${sources[@]}" --out "$corpus" --vocab 8192 --bpe-mib 8 --held-out 0.03 \
    --extensions "$extensions" --max-bytes "$max_bytes" --max-file-bytes 262144

# Stop the run in the middle, as a scheduler would: a signal; it checkpoints and exits with 75, "resume me".
# -q: that a rank exits with 75 is no news here; Open MPI 5 has no such option.
case $(mpirun --version) in *'(Open MPI) 4.'*) quiet=-q ;; *) quiet= ;; esac
mpirun $quiet -n 2 target/release/tiefsee train --config configs/run/quickstart.toml "${settings[@]}" &
mpirun=$!
trap 'kill -TERM $mpirun 2>/dev/null || true' EXIT
until [ "$(cat "$run/log/rank-0.jsonl" 2>/dev/null | grep -c '"loss"')" -ge "$stop_after" ]; do
    kill -0 $mpirun 2>/dev/null || break
    sleep 0.1
done
say "stopping it with SIGUSR1"
kill -USR1 $mpirun 2>/dev/null || true
code=0
wait $mpirun || code=$?
trap - EXIT
[ $code = 75 ] || fail "the stopped run exited with $code, not with 75"

say "resuming it"
mpirun -n 2 target/release/tiefsee resume "$run"
target/release/tiefsee checkpoint verify "$(ls -d "$run"/checkpoints/step-* | tail -n 1)"

python3 - "$run" "$((SECONDS - started))" "$least" <<'PY'
import json, sys
run, seconds, least = sys.argv[1:]
s = json.load(open(f"{run}/summary.json"))
gain = s["unigram_entropy"] - s["val_loss_end"]
print(f"""
quickstart: done in {seconds} s after the build
  steps, tokens     {s["steps"]}, {s["tokens"]}, at {s["tokens_per_s"]:.0f} tokens/s
  held-out loss     {s["val_loss_start"]:.4f} -> {s["val_loss_end"]:.4f} nats a token
  unigram entropy   {s["unigram_entropy"]:.4f} (held out): the model is {gain:.4f} {"below" if gain > 0 else "above (!)"}
  checkpoint        {s["checkpoint"]}
  summary           {run}/summary.json
  log               {run}/log/rank-0.jsonl
  TensorBoard       tensorboard --logdir {run}/tensorboard
  corpus            corpus/quickstart""")
if not s["finished"]:
    sys.exit("quickstart: error: the run did not finish")
if gain < float(least):
    sys.exit(f"quickstart: error: the held-out loss is not {least} nats below the unigram entropy")
PY
