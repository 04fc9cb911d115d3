#!/usr/bin/env bash
# The Python that the tests' oracles run in: .deps/venv, with what tests/oracle/requirements.txt pins (about 5 GB, most of it
# CUDA libraries that torch will not be imported without). A second run does nothing and says so. Training needs none of it.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
venv=.deps/venv
pins=tests/oracle/requirements.txt
stamp=$venv/installed-requirements.txt

if cmp -s "$pins" "$stamp" && "$venv/bin/python" -c '' 2>/dev/null; then
    echo "test venv: nothing to do: $venv has what $pins pins"
    exit 0
fi
echo "test venv: downloading with pip (2.5 GB): $(grep -cv -e '^#' -e '^$' "$pins") pinned packages of $pins, and torch's CUDA libraries"
rm -f "$stamp"
"$venv/bin/python" -c '' 2>/dev/null || "${PYTHON:-python3}" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check -r "$pins" </dev/null
"$venv/bin/python" -c 'import torch, transformers, tensorboard, safetensors, tokenizers, numpy'
cp "$pins" "$stamp"
echo "test venv: $((SECONDS - started)) s, $(du -sh "$venv" | cut -f1)B on disk in $venv"
