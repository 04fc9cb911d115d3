"""A checkpoint's save, load and stall beside raw fsynced writes, raw reads and torch.distributed.checkpoint, on one disk.

    checkpoint.py --ours CMD --rival CMD [--dir DIR] [--gb N] [--rounds N] [--json FILE]

Both commands are run with DIR GB ROUNDS behind them, in turn. Figures are medians of the rounds; ratios to raw I/O are the
medians of each round's own. The first round of ours allocates what later saves use again, and is in the medians.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from compare import cpu_name, commit


def run(command, *args):
    done = subprocess.run([*shlex.split(command), *map(str, args)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {command}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", required=True)
    parser.add_argument("--rival", required=True)
    parser.add_argument("--dir", type=Path, default=Path("runs/bench-checkpoint"))
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    busy = os.getloadavg()[0]
    ours = run(args.ours, args.dir, args.gb, args.rounds)
    rival = run(args.rival, args.dir, args.gb, args.rounds)
    median = lambda side, key: statistics.median(one[key] for one in side["rounds"])
    ratio = lambda raw, key: statistics.median(one[raw] / one[key] for one in ours["rounds"])
    result = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "commit": commit(),
        "load_average_before": busy,
        "bytes": ours["bytes"],
        "rival": f"torch.distributed.checkpoint of torch {rival['torch']}",
        "ours_s": {key: median(ours, key) for key in ours["rounds"][0]},
        "rival_s": {key: median(rival, key) for key in rival["rounds"][0]},
        "save_over_raw": ratio("raw_write_s", "save_s"),
        "load_over_raw": ratio("raw_read_s", "load_s"),
        "stall_share_of_a_minute": median(ours, "stall_s") / 60,
        "rounds": {"ours": ours["rounds"], "rival": rival["rounds"]},
    }
    rate = lambda seconds: f"{seconds:8.2f} s {ours['bytes'] / seconds / 1e9:6.2f} GB/s"
    mine, theirs = result["ours_s"], result["rival_s"]
    print(f"checkpoint: {ours['bytes'] / 1e9:.2f} GB of FP32 on one rank, medians of {args.rounds} rounds; {result['machine']}, {result['commit']}")
    print(f"  raw fsynced write {rate(mine['raw_write_s'])}")
    print(f"  save              {rate(mine['save_s'])}   {result['save_over_raw']:.2f} of raw (goal 0.90); rival {rate(theirs['save_s'])}, ratio {theirs['save_s'] / mine['save_s']:.2f} (goal > 1)")
    print(f"  raw cold read     {rate(mine['raw_read_s'])}")
    print(f"  load, checked     {rate(mine['load_s'])}   {result['load_over_raw']:.2f} of raw (goal 0.90); rival, unchecked {rate(theirs['load_s'])}, ratio {theirs['load_s'] / mine['load_s']:.2f} (goal > 1)")
    print(f"  stall             {mine['stall_s'] * 1e3:8.1f} ms   {result['stall_share_of_a_minute']:.3%} of a minute (goal < 2 %); rival {theirs['stall_s'] * 1e3:.1f} ms, ours is {mine['stall_s'] / theirs['stall_s']:.2f} of it (goal 0.50); rival's copy on a thread of its own {theirs['thread_stall_s'] * 1e3:.1f} ms")
    print(f"  a step beside it, on every core, took longer by {mine['slowed_s'] * 1e3:.0f} ms; rival {theirs['slowed_s'] * 1e3:.0f} ms, copying on a thread of its own {theirs['thread_slowed_s'] * 1e3:.0f} ms")
    print(f"  rival: {result['rival']}")
    if busy > 0.5:
        print(f"  NOT QUIET: the machine's load was {busy:.1f} before: run it again")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"  written to {args.json}")


if __name__ == "__main__":
    main()
