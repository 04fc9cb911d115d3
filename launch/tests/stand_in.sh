#!/usr/bin/env bash
# Behaves like a rank of `tiefsee` as far as a launcher can see: steps logged, checkpoints, exit 75 when asked to stop.
#   stand_in.sh train --config FILE --set run.dir=DIR | resume DIR
# DIR/fault holds "RANK STEP KIND", taken once: kill | kills (each time) | exit5 | quit | hang | freeze | deaf | unsaved | lost. DIR/fault.next is the one after it.
stop=0 unsaved=0 lost=0
trap 'stop=1' USR1
# mpirun's names, or those of a rank that srun started.
rank=${OMPI_COMM_WORLD_RANK:-${SLURM_PROCID:-0}}
size=${OMPI_COMM_WORLD_SIZE:-${SLURM_NTASKS:-1}}
if [ "$1" = resume ]; then dir=$2; else dir=${5#run.dir=}; fi
step=0
rm -f "$dir/quit"
[ "$1" = resume ] && step=$(ls "$dir/checkpoints" | grep '^step-' | tail -1 | sed 's/^step-0*//')
if [ "$1" = train ] && [ "$rank" = 0 ]; then
    [ -e "$dir/resolved.toml" ] && { echo "error (rank 0): already holds a run" >&2; exit 1; }
    touch "$dir/resolved.toml"
fi
rm -f "$dir/stopped"
echo "$1 from $step"
first=$((step + 1))
checkpoint() {
    mkdir -p "$dir/checkpoints/$(printf 'step-%08d' "$step")" && echo '{}' >"$dir/checkpoints/$(printf 'step-%08d' "$step")/manifest.json"
}
# Without a child process: mpirun's signal goes to the whole group and would end it.
unfinished() {
    steps=
    until [ -n "$steps" ]; do read -r steps <"$dir/steps"; done
    [ "$step" -lt "$steps" ]
}
while unfinished; do
    [ -e "$dir/quit" ] && exit 0
    if [ "$stop" = 1 ]; then
        if [ "$unsaved" = 1 ]; then echo "error (rank $rank): no room" >&2; exit 1; fi
        if [ "$lost" = 1 ]; then echo "error (rank $rank): state lost: a master changed" >&2; exit 76; fi
        if [ "$rank" = 0 ]; then checkpoint && touch "$dir/stopped"; fi
        until [ -e "$dir/stopped" ]; do sleep 0.05; done
        exit 75
    fi
    step=$((step + 1))
    if read -r who when kind 2>/dev/null <"$dir/fault" && [ "$who" = "$rank" ] && [ "$when" = "$step" ]; then
        # What the others do in the step before is done: one that is ended in it would not have logged it.
        for ((peer = 0; peer < size; peer++)); do
            until [ "$step" = "$first" ] || [ "$(cat "$dir/done-$PMIX_NAMESPACE-$peer" 2>/dev/null || echo 0)" -ge $((step - 1)) ] 2>/dev/null; do sleep 0.02; done
        done
        mv "$dir/fault" "$dir/fault.taken"
        [ -e "$dir/fault.next" ] && mv "$dir/fault.next" "$dir/fault"
        case $kind in
        kill) kill -9 $$ ;;
        kills) mv "$dir/fault.taken" "$dir/fault"; kill -9 $$ ;;
        exit5) echo "error (rank $rank): out of ideas" >&2; exit 5 ;;
        hang) while :; do sleep 0.2; done ;;
        quit) touch "$dir/quit"; exit 0 ;;
        freeze) kill -STOP $$ ;;
        unsaved) unsaved=1 ;;
        lost) lost=1 ;;
        deaf) trap '' USR1 TERM; while :; do sleep 0.2; done ;;
        esac
    fi
    # A step ends, and is logged, once every rank is there: a collective.
    echo "$step" >"$dir/at-$PMIX_NAMESPACE-$rank"
    for ((peer = 0; peer < size; peer++)); do
        until [ "$(cat "$dir/at-$PMIX_NAMESPACE-$peer" 2>/dev/null || echo 0)" -ge "$step" ] 2>/dev/null || [ "$stop" = 1 ] || [ -e "$dir/quit" ]; do sleep 0.05; done
    done
    echo "{\"step\":$step,\"step_ms\":50.0}" >>"$dir/log/rank-$rank.jsonl"
    [ "$rank" = 0 ] && [ $((step % 4)) = 0 ] && checkpoint
    echo "$step" >"$dir/done-$PMIX_NAMESPACE-$rank"
    sleep 0.05
done
[ "$rank" = 0 ] && echo '{"finished": true}' >"$dir/summary.json"
# A peer that read the number of steps before it was changed does not wait for us.
echo 999999999 >"$dir/at-$PMIX_NAMESPACE-$rank"
exit 0
