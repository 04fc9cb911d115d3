"""A checkpoint's save, load and stall beside raw fsynced writes, raw reads and torch.distributed.checkpoint, on one disk.

    checkpoint.py --ours CMD --rival CMD [--dir DIR] [--gb N] [--rounds N] [--json FILE]

Both commands are run with DIR GB behind them and take turns, a round each. Figures are medians of the rounds. A raw write or
read is the faster of its round: through the page cache, or past it; what the disk can do is measured past it in large pages. A
ratio is the median of each round's own. Caches are cold for every read, and every write ends with an fsync. The first round of each side allocates
what later ones use again, and is in the medians.
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

RAW = ("cached", "direct")


class Side:
    """A process that measures a round for each line it gets."""

    def __init__(self, command, *args):
        self.command = command
        self.process = subprocess.Popen([*shlex.split(command), *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rounds = []

    def round(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"exit code {self.process.wait()}: {self.command}")
        self.rounds.append(json.loads(line))

    def end(self):
        self.process.stdin.close()
        if self.process.wait():
            sys.exit(f"exit code {self.process.returncode}: {self.command}")

    def median(self, key):
        return statistics.median(one[key] for one in self.rounds)

    def spread(self, key):
        return f"{min(one[key] for one in self.rounds):.2f} to {max(one[key] for one in self.rounds):.2f}"


def raw(one, what):
    return min(one[f"{kind}_{what}_s"] for kind in RAW)


def measure(args):
    sides = [Side(command, args.dir / name, args.gb) for name, command in (("ours", args.ours), ("rival", args.rival))]
    for _ in range(args.rounds):
        for side in sides:
            side.round()
    for side in sides:
        side.end()
    return sides


def report(result, ours, theirs):
    size = ours.rounds[0]["bytes"]
    rate = lambda seconds: f"{seconds:7.2f} s {size / seconds / 1e9:5.2f} GB/s"
    print(f"checkpoint: {size / 1e9:.2f} GB of FP32 on one rank, medians of {len(ours.rounds)} rounds; {result['machine']}, {result['commit']}")
    for what, key, word in (("write", "save_s", "save"), ("read", "load_s", "load")):
        each = ", ".join(f"{kind} {ours.median(f'{kind}_{what}_s'):.2f} s" for kind in RAW)
        print(f"  raw {what:5} {rate(statistics.median(raw(one, what) for one in ours.rounds))}   the faster of {each}")
        print(f"  the disk  {rate(ours.median(f'large_{what}_s'))}   from large pages, nothing copied or hashed")
        of_disk = statistics.median(one[f"large_{what}_s"] / one[key] for one in ours.rounds)
        print(f"  {word:9} {rate(ours.median(key))} ({ours.spread(key)} s)   {result[f'{word}_over_raw']:.2f} of raw (goal 0.90), {of_disk:.2f} of the disk")
        print(f"  rival's   {rate(theirs.median(key))} ({theirs.spread(key)} s)   {theirs.median(key) / ours.median(key):.2f} times ours (goal > 1)")
    stall, his, thread = ours.median("stall_s"), theirs.median("stall_s"), theirs.median("thread_stall_s")
    print(f"  stall     {stall * 1e3:.1f} ms, {stall / 60:.3%} of a minute (goal < 2 %); rival's {his * 1e3:.1f} ms, ours is {stall / his:.2f} of it (goal 0.50); with a thread of its own for the copy {thread * 1e3:.1f} ms")
    slowed = [side.median(key) * 1e3 for side, key in ((ours, "slowed_s"), (theirs, "slowed_s"), (theirs, "thread_slowed_s"))]
    print("  a step beside it, on every core, took longer by {:.0f} ms; rival's {:.0f} ms, copying on a thread of its own {:.0f} ms".format(*slowed))
    print(f"  rival: {result['rival']}; it checks nothing of what it loads, ours all")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", required=True)
    parser.add_argument("--rival", required=True)
    parser.add_argument("--dir", type=Path, default=Path("runs/bench-checkpoint"))
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    busy = os.getloadavg()[0]
    ours, theirs = measure(args)
    result = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "commit": commit(),
        "load_average_before": busy,
        "rival": f"torch.distributed.checkpoint of torch {theirs.rounds[0]['torch']}",
        "save_over_raw": statistics.median(raw(one, "write") / one["save_s"] for one in ours.rounds),
        "load_over_raw": statistics.median(raw(one, "read") / one["load_s"] for one in ours.rounds),
        "rounds": {"ours": ours.rounds, "rival": theirs.rounds},
    }
    report(result, ours, theirs)
    if busy > 0.5:
        print(f"  NOT QUIET: the machine's load was {busy:.1f} before: run it again")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"  written to {args.json}")


if __name__ == "__main__":
    main()
