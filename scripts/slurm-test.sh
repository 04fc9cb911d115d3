#!/usr/bin/env bash
# train.sbatch under a real slurmctld and slurmd, with a stand-in for `tiefsee`: scripts/slurm-test.sh [--long]
#   short: a 2-node job over mpirun is signalled as at its time limit, checkpoints, is requeued and finishes;
#          one over srun and PMIx (where that is) is cancelled and leaves no process
#   --long: the signal is the time limit's own
# Needs root; installs slurm-wlm and munge with apt where they are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then echo "SKIPPED: needs root for munged and slurmd" && exit 0; fi
if ! command -v slurmctld munged slurmd >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge; } >/dev/null ||
        { echo "SKIPPED: slurm-wlm and munge cannot be installed" && exit 0; }
fi
cargo build --release --quiet -p launch
state=$(mktemp -d)
trap 'scripts/fixtures/slurm.sh stop "$state"; rm -rf "$state"' EXIT
scripts/fixtures/slurm.sh start "$state" 2
eval "$(scripts/fixtures/slurm.sh env "$state")"

fail() {
    echo "FAILED: $*" >&2
    scontrol show jobs >&2 || true
    tail -n 40 "$state"/*.out "$state/log/slurmctld.log" >&2 || true
    exit 1
}
# until WHAT SECONDS COMMAND: the command is tried until it succeeds.
until_true() {
    local what=$1 tries=$(($2 * 5))
    shift 2
    for ((i = 0; i < tries; i++)); do
        if "$@" >/dev/null 2>&1; then return 0; fi
        sleep 0.2
    done
    fail "waited in vain for $what"
}
# submit RUN LAUNCHER SBATCH_OPTIONS…: prints the job's number.
submit() {
    local run=$1 launcher=$2
    shift 2
    mkdir -p "$state/$run"
    echo 1000000 >"$state/$run/steps"
    LAUNCH_OPTIONS="--launcher $launcher --program $PWD/launch/tests/stand_in.sh" \
        sbatch --parsable --nodes=2 --ntasks-per-node=1 --output="$state/$run.out" "$@" \
        scripts/train.sbatch train --config none.toml --set "run.dir=$state/$run"
}
stepped() { [ -s "$state/$1/log/rank-0.jsonl" ] && [ -s "$state/$1/log/rank-1.jsonl" ]; }
# SLURM lets a requeued job wait for two minutes; it can be told otherwise once the job has left its nodes.
resumed() { if shows "$1" JobState=PENDING; then scontrol update JobId="$1" StartTime=now && sleep 3; fi; grep -q "resume from" "$state/requeued.out"; }
# Not through a pipe: grep -q would end scontrol early, and pipefail call that a failure.
shows() { [[ $(scontrol show job "$1") == *"$2"* ]]; }
no_process() { ! grep -lqs "$state/$1" /proc/[0-9]*/cmdline; }

if [ "${1:-}" = --long ]; then limit=(--time=1 --signal=B:USR1@50); else limit=(); fi
job=$(submit requeued mpirun "${limit[@]}")
until_true "the job's steps" 40 stepped requeued
[ "${1:-}" = --long ] || scancel --batch --signal=USR1 "$job"
until_true "the requeue" 120 shows "$job" Restarts=1
grep -q "exit code 75, requeued" "$state/requeued.out" || fail "no exit code 75"
ls "$state"/requeued/checkpoints/step-*/manifest.json >/dev/null || fail "no checkpoint"
# Started in the same breath, the job fails: slurmd has to see the old batch shell off first. That is what the two minutes
# are for.
until_true "the old batch shell's end" 30 no_process requeued
sleep 3
until_true "the resumed run" 20 resumed "$job"
echo 1 >"$state/requeued/steps"
until_true "its end" 60 shows "$job" JobState=COMPLETED
until_true "its processes' end" 10 no_process requeued
echo "ok: stopped, checkpointed, requeued, resumed, finished (mpirun, 2 nodes)"

if srun --mpi=list 2>&1 | grep -q pmix; then launcher=srun; else launcher=mpirun; fi
job=$(submit cancelled "$launcher")
until_true "the job's steps" 40 stepped cancelled
scancel "$job"
until_true "the cancelled job's end" 30 shows "$job" JobState=CANCELLED
until_true "its processes' end" 30 no_process cancelled
echo "ok: cancelled, no process is left ($launcher, 2 nodes)"
