#!/usr/bin/env bash
# The Python that the data benches' rivals run in: .deps/bench-venv, with what benches/rivals/requirements.txt pins, on top of
# the test venv (torch and numpy are taken from there). A second run does nothing and says so. Neither training nor tests need it.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/test-venv.sh
started=$SECONDS
venv=.deps/bench-venv
pins=benches/rivals/requirements.txt
stamp=$venv/installed-requirements.txt

if cmp -s "$pins" "$stamp" && "$venv/bin/python" -c '' 2>/dev/null; then
    echo "bench venv: nothing to do: $venv has what $pins pins"
    exit 0
fi
echo "bench venv: downloading with pip (about 100 MB): $(grep -cv -e '^#' -e '^$' "$pins") pinned packages of $pins"
rm -f "$stamp"
"$venv/bin/python" -c '' 2>/dev/null || .deps/venv/bin/python -m venv --clear "$venv"
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
echo "$(site .deps/venv)" >"$(site "$venv")/test-venv.pth"
# The list is complete; what the packages say they need besides (clouds' clients, torchvision) reading local files does not.
"$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-deps -r "$pins" </dev/null
"$venv/bin/python" -c 'import datasets, pyarrow, streaming, tokenizers, numpy'
cp "$pins" "$stamp"
echo "bench venv: $((SECONDS - started)) s, $(du -sh "$venv" | cut -f1)B on disk in $venv"
