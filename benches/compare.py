"""Ours against a rival: runs both in turn on this machine, prints a table, writes the same figures as JSON.

    compare.py NAME --config FILE --ours CMD --rival CMD [--rounds N] [--threads N] [--json FILE]

A command prints, as its last line, a JSON object with tokens_per_s. `RIVAL --search` names the options that make it
fastest here, in a process of its own, so that all timed ones are alike. A round runs both, and the order swaps from round
to round. A round in which other processes had more than QUIET of the machine while either ran is done again, whatever its
figures; where the machine never is that quiet the rounds count as they are and the table says so. Each side's figure is
the median of its rounds, the ratio the median of the rounds' ratios.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path


QUIET = 0.05
MOST_TRIES = 3


def busy_seconds():
    """CPU seconds the whole machine has been busy."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def run(command):
    """(what it printed, the share of the machine that others had meanwhile)"""
    own, busy, start = resource.getrusage(resource.RUSAGE_CHILDREN), busy_seconds(), time.monotonic()
    done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True)
    wall, busy, now = time.monotonic() - start, busy_seconds() - busy, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {command}")
    own = now.ru_utime + now.ru_stime - own.ru_utime - own.ru_stime
    return json.loads(done.stdout.strip().splitlines()[-1]), max(0.0, busy - own) / (wall * os.cpu_count())


def one_round(ours, rival, ours_first):
    """{"ours", "rival", "others"} of one round, repeated until the machine is quiet or MOST_TRIES are used up."""
    for attempt in range(MOST_TRIES):
        results = [run(command) for command in ((ours, rival) if ours_first else (rival, ours))]
        (a, others_a), (b, others_b) = results if ours_first else results[::-1]
        others = max(others_a, others_b)
        if others <= QUIET:
            break
        print(f"  others had {others:.0%} of the machine (attempt {attempt + 1} of {MOST_TRIES})", file=sys.stderr)
    return {"ours": a, "rival": b, "others": round(others, 3)}


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit():
    git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + (" and uncommitted changes" if git("status", "--porcelain", "-uno") else "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--config", required=True)
    parser.add_argument("--ours", required=True)
    parser.add_argument("--rival", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    best, _ = run(args.rival + " --search")
    rival = f"{args.rival} --experts {best['experts']} --attention {best['attention']}"
    rounds = [one_round(args.ours, rival, ours_first=index % 2 == 0) for index in range(args.rounds)]
    ratios = [pair["ours"]["tokens_per_s"] / pair["rival"]["tokens_per_s"] for pair in rounds]
    speed = lambda side: statistics.median(pair[side]["tokens_per_s"] for pair in rounds)
    versions = rounds[0]["rival"]
    result = {
        "name": args.name,
        "config": args.config,
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "commit": commit(),
        "threads": args.threads,
        "ours_tokens_per_s": speed("ours"),
        "rival": f"transformers {versions['transformers']}, torch {versions['torch']}, {best['experts']} experts, {best['attention']} attention",
        "rival_tokens_per_s": speed("rival"),
        "rival_tried_step_ms": best["tried_step_ms"],
        "ratio": statistics.median(ratios),
        "quiet": all(pair["others"] <= QUIET for pair in rounds),
        "rounds": rounds,
    }
    print(f"{args.name}: {args.config}, {args.threads} threads, medians of {args.rounds} rounds in turn")
    print(f"  machine  {result['machine']}")
    print(f"  commit   {result['commit']}")
    print(f"  {'':10}{'tokens/s':>10}")
    print(f"  {'tiefsee':10}{result['ours_tokens_per_s']:>10.0f}")
    print(f"  {'rival':10}{result['rival_tokens_per_s']:>10.0f}   {result['rival']}")
    print(f"  {'ratio':10}{result['ratio']:>10.3f}   {min(ratios):.3f} to {max(ratios):.3f} over the rounds")
    if not result["quiet"]:
        print(f"  NOT QUIET: other processes had up to {max(pair['others'] for pair in rounds):.0%} of the machine: run it again")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"  written to {args.json}")


if __name__ == "__main__":
    main()
