"""Steps of one model over layouts of 1, 2, 4 and 8 ranks that are threads: prints a table, writes the same figures as JSON.

    parallel.py --ours CMD [--steps N] [--json FILE]

Each layout is a process of its own, so that its peak memory is its own. Two ranks are a node. Bytes are what all ranks
sent in a step. Ranks share the machine's cores: where there are fewer cores than ranks, step times cannot fall, and a wait
for a peer contains its wait for a core. Then what a paired step hides of its transfers (`tiefsee bench --overlap`): its
compute is measured over a link that takes no time, waits for the peer included, so a ratio can be a little below 1.
Exits with 1 where MoE dispatch sent other bytes than its formula says.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from compare import cpu_name, commit

# pp, dp, ep, schedule, precision
LAYOUTS = [
    (1, 1, 1, "1f1b", "f32"), (1, 2, 2, "1f1b", "f32"), (1, 4, 4, "paired", "f32"), (2, 2, 2, "1f1b", "f32"), (2, 4, 4, "dualpipe", "f32"),
    (1, 2, 2, "1f1b", "bf16"), (1, 2, 2, "1f1b", "fp8"),
]
PARTS = ("rms_norm", "mla_up_projection", "swiglu")
RECOMPUTE = [(), ("swiglu",), ("mla_up_projection",), ("rms_norm",), PARTS]
DATA = ("data", "embedding", "expert_data")


# Freed memory goes back at once, so that the peak is of what was live.
LIVE = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run(command, env=None, **settings):
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(shlex.split(command) + sets, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {command} {' '.join(sets)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratio(row, where):
    """Bytes ÷ formula; None where the formula is 0 and so are the bytes."""
    sent, formula = row["dispatch"][where], row["formula"][where]
    return None if sent == formula == 0 else sent / formula if formula else float("inf")


def print_layouts(rows):
    print(f"  {'':27}{'step':>8}{'peak':>7}{'comm.':>7}   {'MB a step:':10}{'':14}{'experts':>16}{'':8}   dispatch ÷ formula")
    print(f"  {'ranks':27}{'ms':>8}{'MB':>7}{'share':>7}{'pipe':>10}{'data':>10}{'inside':>10}{'between':>10}{'world':>10}{'inside':>10}{'between':>10}")
    for row in rows:
        axes = row["axes"]
        size = lambda axis: (axes[axis]["inside"] + axes[axis]["between"]) / 1e6
        ratios = [ratio(row, where) for where in ("inside", "between")]
        cells = [size("pipe"), sum(map(size, DATA)), axes["expert"]["inside"] / 1e6, axes["expert"]["between"] / 1e6, size("world")]
        name = f"{row['ranks']}: pp{row['pp']} dp{row['dp']} ep{row['ep']} {row['schedule']} {row['precision']}"
        print(f"  {name:27}{row['step_ms']:>8.0f}{row['peak_bytes'] / 1e6:>7.0f}{row['share']:>7.0%}" + "".join(f"{cell:>10.3f}" for cell in cells)
              + "".join(f"{'-' if cell is None else f'{cell:.2f}':>10}" for cell in ratios))


def print_recompute(rows):
    print(f"  {'made again in backward, 1 rank':46}{'step ms':>9}{'peak MB':>9}")
    for row in rows:
        print(f"  {', '.join(row['recompute']) or 'nothing':46}{row['step_ms']:>9.0f}{row['peak_bytes'] / 1e6:>9.0f}")


def print_overlap(found):
    print(f"  overlap: dp2 ep2, no reduction; {found['compute_ms']:.0f} ms to compute, transfers of {found['transfer_ms']:.1f} ms that need no processor")
    print(f"  {'':27}{'ms':>8}   ÷ Σ over segments of max(compute, transfer) = {found['bound_ms']:.0f} ms")
    for index, (name, key) in enumerate([("paired", "paired"), ("1f1b: hides nothing", "plain")]):
        each = ", ".join(f"{pair[index]:.2f}" for pair in found["ratios"])
        goal = ", goal ≤ 1.10" if key == "paired" else ""
        print(f"  {name:27}{found[key + '_ms']:>8.0f}{found[key + '_ratio']:>7.2f} (rounds {each}{goal})")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    load, rows = os.getloadavg()[0], []
    for pp, dp, ep, schedule, precision in LAYOUTS:
        layout = {"pp": pp, "dp": dp, "ep": ep, "schedule": schedule, "ranks_per_node": 2 if pp * dp > 1 else 1}
        command = f"{args.ours} --steps {args.steps} --ranks {pp * dp} --set run.precision={precision}"
        rows.append(run(command, **{f"parallel.{key}": value for key, value in layout.items()}) | {"precision": precision})
    # One micro-batch of many sequences, so that activations outweigh the weights.
    many = "--set phase.0.batch=48 --set phase.0.micro_batch=48"
    memory = [
        run(f"{args.ours} --steps 1 {many}", LIVE, **{f"recompute.{part}": str(part in parts).lower() for part in PARTS}) | {"recompute": parts}
        for parts in RECOMPUTE
    ]
    # 16 micro-batches a rank: the first forward and the last backward have nothing to hide under.
    overlap = run(f"{args.ours} --overlap --ranks 2 --steps {args.steps} --set phase.0.batch=64 --set phase.0.micro_batch=2", **{"parallel.ep": 2})
    result = {"machine": f"{cpu_name()}, {os.cpu_count()} cores", "commit": commit(), "load_before": round(load, 2), "layouts": rows, "recompute": memory, "overlap": overlap}
    print(f"parallel-cpu: {args.ours.split('--config ')[-1]}, one thread a rank, two ranks a node, median of {args.steps} steps")
    print(f"  machine  {result['machine']}, load {load:.1f} before")
    print(f"  commit   {result['commit']}")
    print_layouts(rows)
    print_recompute(memory)
    print_overlap(overlap)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"  written to {args.json}")
    if any(ratio(row, where) not in (None, 1.0) for row in rows for where in ("inside", "between")):
        sys.exit("MoE dispatch sent other bytes than its formula says")


if __name__ == "__main__":
    main()
