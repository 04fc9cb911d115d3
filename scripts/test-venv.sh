#!/usr/bin/env bash
# The Python that the tests' oracles run in: .deps/venv, with what tests/oracle/requirements.txt pins (about 5 GB, most of it
# CUDA libraries that torch will not be imported without). A second run does nothing and says so. Training needs none of it.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
venv=.deps/venv
pins=tests/oracle/requirements.txt
stamp=$venv/installed-requirements.txt
python=${PYTHON:-python3}

say() { echo "test venv: $*"; }
fail() { echo "test venv: error: $*" >&2; exit 1; }
missing_packages() { "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv; }
. scripts/apt.sh

if cmp -s "$pins" "$stamp" && "$venv/bin/python" -c '' 2>/dev/null; then
    say "nothing to do: $venv has what $pins pins"
    exit 0
fi
rm -f "$stamp"
if ! "$venv/bin/python" -c '' 2>/dev/null; then
    install_packages
    "$python" -m venv --clear "$venv"
fi
say "downloading with pip (2.5 GB): $(grep -cv -e '^#' -e '^$' "$pins") pinned packages of $pins, and torch's CUDA libraries"
"$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check -r "$pins" </dev/null
"$venv/bin/python" -c 'import torch, transformers, tensorboard, safetensors, tokenizers, numpy'
cp "$pins" "$stamp"
say "$((SECONDS - started)) s, $(du -sh "$venv" | cut -f1)B on disk in $venv"
