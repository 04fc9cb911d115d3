#!/usr/bin/env bash
# A run over several hosts on one machine, each a network namespace: scripts/namespaces.sh HOSTS RANKS [OPTIONS] -- COMMAND…
#   scripts/namespaces.sh 2 1 -- train --config configs/run/quickstart.toml
# OPTIONS are tiefsee-launch's. Needs root. The hosts are h1, h2 …; meanwhile, from another shell, with the folder it prints:
#   scripts/fixtures/hosts.sh cut DIR h2       pull a cable       scripts/fixtures/hosts.sh join DIR h2       put it back
#   scripts/fixtures/hosts.sh crash DIR h2     a power failure    scripts/fixtures/hosts.sh run DIR h1 top    look around
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,4s/^# *//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
hosts=$1 ranks=$2
shift 2
fixture=$here/scripts/fixtures/hosts.sh
state=$(mktemp -d)
trap '"$fixture" down "$state"; rm -rf "$state"' EXIT
"$fixture" up "$state" "$hosts"
echo "hosts of this run: $state" >&2
names=$(seq -s, -f 'h%g' "$hosts")
"$fixture" run "$state" h1 "$here/scripts/launch.sh" --hosts "$names" --nproc-per-node "$ranks" \
    --interface "$("$fixture" network "$state")" --rsh-agent "$fixture agent $state" "$@"
