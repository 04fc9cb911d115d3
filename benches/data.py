"""The data crate's figures, each beside its rivals on the same tokens in the same run; a table, and the same as JSON.

    data.py read|index|prepare [--rounds N] [--json FILE]

scripts/bench.sh data, data-index and prepare call it. Readers run in turn, in a new process each, and every other round in
the opposite order; a figure is the median of its rounds. Where other processes had more than compare.QUIET of the machine,
the table says so.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

from compare import QUIET, commit, cpu_name, run

CORPUS = Path("corpus/bench")
EXAMPLES = Path(os.environ.get("CARGO_TARGET_DIR", "target")) / "release" / "examples"
PYTHON = ".deps/bench-venv/bin/python"
# Enough for some seconds of each.
RIVALS = {"mmap": 400e6, "mosaic": 60e6, "mosaic-loader": 120e6, "datasets": 120e6, "datasets-text": 1e6}


def in_turn(commands, rounds):
    """{name: [figures of each round]}, and the largest share that others had of the machine."""
    results, others = {name: [] for name in commands}, 0.0
    for number in range(rounds):
        for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
            figures, share = run(commands[name])
            results[name].append(figures)
            others = max(others, share)
    return results, others


def median(results, name, key):
    return statistics.median(figures[key] for figures in results[name])


def claim(text, value, limit, at_least=True):
    holds = value >= limit if at_least else value <= limit
    print(f"  {text:66}{value:>10.3g}   {'at least' if at_least else 'at most'} {limit:g}: {'holds' if holds else 'DOES NOT HOLD'}")
    return {"claim": text, "value": value, "limit": limit, "holds": holds}


def read(rounds):
    scratch = CORPUS / "rivals"
    rival = f"{PYTHON} benches/rivals/data_read.py {{}} {CORPUS}/tokens --scratch {scratch} --text {CORPUS}/text --tokens {{}}"
    for name in RIVALS:  # makes their formats
        run(rival.format(name, 100_000))
    commands = {"tiefsee": f"{EXAMPLES}/bench_read {CORPUS}/tokens 12"}
    commands |= {name: rival.format(name, int(tokens)) for name, tokens in RIVALS.items()}
    results, others = in_turn(commands, rounds)
    print(f"{'':16}{'Mtokens/CPU-s':>14}{'private MB':>12}{'resume ms':>11}  same sample after resume")
    for name in commands:
        speed, memory, resume = (median(results, name, key) for key in ("mtokens_per_cpu_s", "private_mb", "resume_ms"))
        print(f"{name:16}{speed:>14.1f}{memory:>12.0f}{resume:>11.1f}  {'yes' if all(r['same_after_resume'] for r in results[name]) else 'NO'}")
    speed = lambda name, number: results[name][number]["mtokens_per_cpu_s"]
    ratio = lambda names: statistics.median(speed("tiefsee", i) / max(speed(name, i) for name in names) for i in range(rounds))
    claims = [
        claim("tiefsee / the better of MosaicML streaming and Hugging Face datasets", ratio([name for name in RIVALS if name != "mmap"]), 10),
        claim("tiefsee / raw mmap of a Megatron-style .bin", ratio(["mmap"]), 0.5),
    ]
    return {"readers": results, "claims": claims}, others


def index(rounds):
    folder = CORPUS.parent / "bench-index"
    command = f"sh -c '{EXAMPLES}/bench_index {folder} | tr \"\\n\" \",\" | sed \"s/^/[/; s/,$/]/\"'"
    results, others = in_turn({"index": command}, rounds)
    shutil.rmtree(folder, ignore_errors=True)
    keys = ["open_ms", "locate_us", "seek_ms_median", "seek_ms_max", "resident_mb"]
    print(f"{'row groups':>12}{'tokens':>10}{'open ms':>10}{'locate µs':>11}{'seek ms':>10}{'max ms':>9}{'memory MB':>11}")
    sizes = []
    for place, first in enumerate(results["index"][0]):
        row = {key: statistics.median(figures[place][key] for figures in results["index"]) for key in keys}
        sizes.append(row | {"row_groups": first["row_groups"], "tokens": first["tokens"]})
        print(f"{first['row_groups']:>12}{first['tokens'] / 1e12:>9.3f}T{row['open_ms']:>10.2f}{row['locate_us']:>11.2f}"
              f"{row['seek_ms_median']:>10.3f}{row['seek_ms_max']:>9.3f}{row['resident_mb']:>11.1f}")
    largest = sizes[-1]
    claims = [
        claim("open the 14.8T-token source, ms", largest["open_ms"], 2000, False),
        claim("memory of the whole process with it open, MB", largest["resident_mb"], 500, False),
        claim("find any position, slowest of 1000, ms", largest["seek_ms_max"], 50, False),
    ]
    return {"sizes": sizes, "claims": claims}, others


def prepare(rounds):
    out = CORPUS / "prepared-again"
    commands = {
        "pipeline": f"sh -c 'rm -rf {out} && {EXAMPLES}/bench_prepare {CORPUS}/text --out {out} --tokenizer {CORPUS}/tokenizer.json --threads 1'",
        "encoder": f"{EXAMPLES}/bench_encode speed {CORPUS}/tokenizer.json {CORPUS}/text",
    }
    results, others = in_turn(commands, rounds)
    shutil.rmtree(out, ignore_errors=True)
    for name in commands:
        print(f"{name:12}{median(results, name, 'mtokens_per_cpu_s'):>8.1f} Mtokens per core-second")
    print(f"{'':12}{median(results, 'pipeline', 'peak_mb'):>8.0f} MB at most in the pipeline")
    same, _ = run(f"{EXAMPLES}/bench_encode compare {CORPUS}/tokenizer.json {CORPUS}/text")
    print(f"ids and text of {same['documents']} documents against Hugging Face tokenizers: {same['bytes'] / 1e6:.1f} MB, "
          f"{same['cjk_bytes'] / 1e6:.1f} MB of it CJK, {same['tokens']} tokens")
    claims = [
        claim("the whole pipeline, Mtokens per core-second", median(results, "pipeline", "mtokens_per_cpu_s"), 12),
        claim("documents whose ids or text differ", same["documents_that_differ"], 0, False),
        claim("text compared, MB", same["bytes"] / 1e6, 100),
    ]
    return {"runs": results, "compared": same, "claims": claims}, others


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["read", "index", "prepare"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = f"{cpu_name()}, {os.cpu_count()} cores"
    print(f"data, {args.what}: medians of {args.rounds} rounds\n  machine  {machine}\n  commit   {commit()}")
    figures, others = {"read": read, "index": index, "prepare": prepare}[args.what](args.rounds)
    if others > QUIET:
        print(f"  NOT QUIET: other processes had up to {others:.0%} of the machine: run it again")
    if args.json:
        result = {"name": args.what, "machine": machine, "commit": commit(), "rounds": args.rounds, "others": round(others, 3)} | figures
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"  written to {args.json}")
    if not all(claim["holds"] for claim in figures["claims"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
