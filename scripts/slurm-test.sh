#!/usr/bin/env bash
# train.sbatch under a real slurmctld and slurmd, training for real: scripts/slurm-test.sh [--long]
#   short: a job on 2 nodes, over mpirun, is signalled as at its time limit, checkpoints, is requeued, resumes and finishes;
#          of an array one task is requeued, and that alone; one over srun and PMIx (where that is) is cancelled and leaves no process; one over each is pre-empted and requeued; one over srun
#          loses a node and goes on with the spare one, also long before SLURM has it down
#   --long: the signal is the time limit's own, as often as it takes
# Needs root. Installs slurm-wlm and munge with apt where they are missing. Ends with 0 and SKIPPED where it cannot run.
set -euo pipefail
cd "$(dirname "$0")/.."
skip() { echo "SKIPPED: $*" && exit 0; }
[ "$(id -u)" = 0 ] || skip "needs root for munged and slurmd"
for program in slurmctld slurmd munged; do
    command -v $program >/dev/null && continue
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge; } >/dev/null </dev/null ||
        skip "slurm-wlm and munge cannot be installed"
    break
done
# As scripts/test.sh builds them: nothing is built twice.
cargo build --release --quiet --workspace
. scripts/env.sh 4
# Two nodes of one host name: Open MPI must not take them for one host and share memory.
export OMPI_MCA_btl=self,tcp OMPI_MCA_btl_tcp_if_include=lo OMPI_MCA_oob_tcp_if_include=lo
state=$(mktemp -d)
trap 'for one in "$state" "$state"/slurm-*; do [ ! -d "$one/run" ] || scripts/fixtures/slurm.sh stop "$one"; done; rm -rf "$state"' EXIT
"${CARGO_TARGET_DIR:-target}/release/tiefsee" prepare configs trainer --out "$state/corpus" --vocab 512 --held-out 0.2 --extensions rs,toml 2>"$state/prepare.out" >&2
scripts/fixtures/slurm.sh start "$state" 2
eval "$(scripts/fixtures/slurm.sh env "$state")"
if [ "${1:-}" = --long ]; then limit=(--time=1 --signal=B:USR1@50) steps=3000; else limit=() steps=400; fi

fail() {
    echo "FAILED: $*" >&2
    scontrol show jobs >&2 || true
    tail -n 40 "$state"/*.out "$state/log/slurmctld.log" >&2 || true
    exit 1
}
# until_true WHAT SECONDS COMMAND: the command is tried until it succeeds.
until_true() {
    local what=$1 end=$((SECONDS + $2))
    shift 2
    while [ $SECONDS -lt $end ]; do
        if "$@" >/dev/null 2>&1; then return 0; fi
        sleep 0.2
    done
    fail "waited in vain for $what"
}
# submit RUN LAUNCHER SBATCH_OPTIONS…: prints the job's number.
submit() {
    local run=$1 launcher=$2
    shift 2
    local told=(--config configs/run/tiny.toml --set "run.dir=$state/$run")
    # A config of its own names its directory.
    [ ! -e "$state/$run.toml" ] || told=(--config "$state/$run.toml" --set run.seed=1%a)
    # 128 tokens a step: 4 sequences of 32.
    LAUNCH_OPTIONS="--launcher $launcher" sbatch --parsable --nodes=2 --ntasks-per-node=1 --output="$state/$run.out" "$@" \
        scripts/train.sbatch train "${told[@]}" --set "data.mixture.0.path=$state/corpus" \
        --set phase.0.batch=4 --set "phase.0.tokens=$((steps * 128 - 4096))" --set phase.1.batch=4 --set phase.1.sequence_length=32 \
        --set phase.1.tokens=4096 --set validation.every=0 --set checkpoint.every=50
}
stepped() { [ -s "$state/$1/log/rank-0.jsonl" ] && [ -s "$state/$1/log/rank-1.jsonl" ]; }
# Not through a pipe: grep -q would end scontrol early, and pipefail call that a failure.
shows() { [[ $(scontrol show job "$1") == *"$2"* ]]; }
no_process() { ! grep -lqs "$state/$1" /proc/[0-9]*/cmdline; }
# SLURM lets a requeued job wait for two minutes; it can be told otherwise once the job has left its nodes. Started in the
# same breath, it fails: slurmd has to see the old batch shell off first. That is what the two minutes are for.
completed() {
    if shows "$1" JobState=PENDING && no_process requeued; then sleep 3 && scontrol update JobId="$1" StartTime=now && sleep 2; fi
    if shows "$1" JobState=FAILED; then fail "the job failed"; fi
    shows "$1" JobState=COMPLETED
}

job=$(submit requeued mpirun "${limit[@]}")
until_true "the job's steps" 60 stepped requeued
[ "${1:-}" = --long ] || scancel --batch --signal=USR1 "$job"
until_true "the requeue" 120 shows "$job" Restarts=1
grep -q "exit code 75, requeued" "$state/requeued.out" || fail "no exit code 75"
ls "$state"/requeued/checkpoints/step-*/manifest.json >/dev/null || fail "no checkpoint"
until_true "its end" 600 completed "$job"
grep -q "resuming from .*checkpoints/step-" "$state/requeued.out" || fail "it did not resume"
grep -q '"finished": *true' "$state/requeued/summary.json" || fail "it did not finish"
[ "$(grep -c '"loss"' "$state/requeued/log/rank-0.jsonl")" = "$steps" ] || fail "not $steps steps, each once"
until_true "its processes' end" 10 no_process requeued
times=$(grep -c "exit code 75, requeued" "$state/requeued.out")
echo "ok: stopped, checkpointed, requeued and resumed ($times time(s)), $steps steps, finished (mpirun, 2 nodes)"

steps=1000000
# The last task of an array has the array's own number: what is done to it must not be done to all.
sed "s|^dir = .*|dir = \"$state/array\"|; s|^model = \"\.\.|model = \"$PWD/configs|" configs/run/tiny.toml >"$state/array.toml"
job=$(submit array mpirun --array=0-1 --nodes=1 --output="$state/array-%a.out")
until_true "the array's steps" 60 eval 'stepped1() { [ -s "$state/array/tiefsee-$job-$1/log/rank-0.jsonl" ]; }; stepped1 0 && stepped1 1'
for task in 0 1; do
    grep -q "^seed = 1$task" "$state/array/tiefsee-$job-$task/resolved.toml" || fail "task $task has another seed than 1$task"
done
scancel --batch --signal=USR1 "${job}_1"
until_true "the requeue" 120 shows "${job}_1" Restarts=1
sleep 2
shows "${job}_0" Restarts=0 || fail "its neighbour was requeued with it"
shows "${job}_0" JobState=RUNNING || fail "its neighbour was ended with it"
scancel "$job"
until_true "the array's processes' end" 30 no_process array
echo "ok: of an array each task has its folder and seed, and one is requeued alone (mpirun, 2 tasks)"

if srun --mpi=list 2>&1 | grep -q pmix; then launcher=srun; else launcher=mpirun; fi
job=$(submit cancelled "$launcher")
until_true "the job's steps" 60 stepped cancelled
[ "$launcher" = mpirun ] || grep -q "2 host(s) (n1, n2)" "$state/cancelled.out" || fail "srun's hosts are not named"
scancel "$job"
until_true "the cancelled job's end" 30 shows "$job" JobState=CANCELLED
until_true "its processes' end" 30 no_process cancelled
echo "ok: cancelled, no process is left ($launcher, 2 nodes)"

# Pre-emption tells srun's ranks, which checkpoint; mpirun's daemons it ends, and the launcher must not start them again.
for launcher in mpirun $(srun --mpi=list 2>&1 | grep -q pmix && echo srun); do
    run=preempted-$launcher
    job=$(submit "$run" "$launcher")
    until_true "the job's steps" 60 stepped "$run"
    urgent=$(sbatch --parsable --partition=urgent --exclusive --nodes=2 --output="$state/urgent.out" --wrap "sleep 1")
    until_true "the requeue" 60 shows "$job" Restarts=1
    if [ "$launcher" = srun ]; then code=75; else code=18; fi
    grep -q "exit code $code, requeued" "$state/$run.out" || fail "no exit code $code"
    if grep -q "restart 1 of" "$state/$run.out"; then fail "started again within the grace"; fi
    until_true "the urgent job's end" 60 shows "$urgent" JobState=COMPLETED
    scancel "$job"
    until_true "its processes' end" 30 no_process "$run"
    echo "ok: pre-empted, exit code $code, requeued ($launcher, 2 nodes)"
done

# Three nodes, of which one is spare: a host that stands still takes slurmd and the ranks with it. With SLURM's default the launcher
# sees that the run hangs, and what srun then says of the node, long before SLURM has it down.
lost() {
    local timeout=$1 run=lost-$1 options=$2 job tasks host task parent
    export SLURMD_TIMEOUT=$timeout
    scripts/fixtures/slurm.sh start "$state/slurm-$timeout" 3
    eval "$(scripts/fixtures/slurm.sh env "$state/slurm-$timeout")"
    job=$(submit "$run" "srun --nnodes 2 $options" --no-kill --nodes=3)
    until_true "a checkpoint" 60 test -e "$state/$run/checkpoints/step-00000050/manifest.json"
    tasks=$(grep -lzs '^SLURMD_NODENAME=n2$' /proc/[0-9]*/environ | cut -d/ -f3 || true)
    host=$(cat "$state/slurm-$timeout/run/slurmd.n2.pid")
    # What started a task is slurmd's, too, and no child of it any more.
    for task in $tasks; do if parent=$(ps -o ppid= -p "$task") && grep -qs slurmstepd /proc/$((parent))/cmdline; then host+=" $((parent))"; fi; done
    # shellcheck disable=SC2086
    kill -STOP $host $tasks
    until_true "the spare node's start" 120 grep -q "host n2 cannot be used and is left out .* 2 host(s) are left" "$state/$run.out"
    until_true "a step of it" 60 grep -q "checkpoints/step-00000100 " "$state/$run.out"
    grep -q "2 rank(s) on 2 host(s) (n1, n3): resume" "$state/$run.out" || fail "not on n1 and n3"
    # shellcheck disable=SC2086
    kill -KILL $host $tasks
    scancel "$job"
    until_true "its processes' end" 30 no_process "$run"
    scripts/fixtures/slurm.sh stop "$state/slurm-$timeout"
    echo "ok: a node was lost, the spare one takes its place (srun, 2 of 3 nodes, SlurmdTimeout=$timeout)"
}
if srun --mpi=list 2>&1 | grep -q pmix; then
    scripts/fixtures/slurm.sh stop "$state"
    lost 10 ""
    lost 300 "--hang-floor 10 --back-off 0"
fi
