#!/usr/bin/env bash
# The long forms of the data crate's tests, on the benches' corpus (130 MB) with the 128K tokenizer, and how documents mix:
#   scripts/data-long.sh [KILLS]
# `tiefsee prepare` killed with -9 at KILLS (50) random moments writes what an undisturbed one writes; every packed sample
# decodes back to its documents, fill-in-the-middle undone. And of the ordinary test: documents of different files mix as in a
# full shuffle.
set -euo pipefail
cd "$(dirname "$0")/.."
kills=${1:-50}
scripts/bench-corpus.sh
cargo build --release --quiet --bin tiefsee
cargo build --release --quiet -p data --examples
bin=${CARGO_TARGET_DIR:-target}/release
work=corpus/bench/long
prepare=("$bin/tiefsee" prepare corpus/bench/text --tokenizer corpus/bench/tokenizer.json --fim-rate 0.1 --split-rate 0.1 --shard-mib 16)

rm -rf "$work"
mkdir -p "$work"
started=$(date +%s%N)
"${prepare[@]}" --out "$work/whole"
usual=$(($(date +%s%N) - started))
RANDOM=7 done=0 corpora=0
while [ "$done" -lt "$kills" ]; do
    rm -rf "$work/killed"
    until [ -e "$work/killed/manifest.json" ] && [ ! -e "$work/killed.partial/job" ]; do
        "${prepare[@]}" --out "$work/killed" >/dev/null 2>"$work/said" &
        victim=$!
        # Anywhere in the time that an undisturbed one takes: most corpora are interrupted more than once.
        sleep "$(awk -v n="$usual" -v r="$RANDOM" 'BEGIN { printf "%.3f", n / 1e9 * r / 32768 }')"
        if kill -9 $victim 2>/dev/null; then done=$((done + 1)); fi
        code=0
        wait $victim 2>/dev/null || code=$?
        [ $code = 0 ] || [ $code = 137 ] || { cat "$work/said"; exit 1; }
    done
    corpora=$((corpora + 1))
    diff -r "$work/whole" "$work/killed"
done
echo "killed $done times over $corpora corpora: each is the undisturbed one, byte for byte"
"$bin/examples/check_corpus" "$work/whole" corpus/bench/text
cargo test --release --quiet -p data --test it -- --nocapture documents_of_different_files | grep "full shuffle"
rm -rf "$work"
