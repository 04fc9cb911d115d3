"""Several GPUs of one host, ours and the rival's in one run: scripts/bench.sh multi-gpu calls this.

    multi_gpu.py --ours CMD --rival CMD --ranks N [--only links,ep,pp,dp] [--json FILE] [--timeline FILE.svg] [--mpirun CMD]

Links: every GPU sends every other one 4096 rows of 7168, as dispatch does in FP8 and combine in BF16, by copy engine
(`peer`) and over NCCL: alone, in a row, and beside GEMMs. Steps: forward + backward and the whole step of V3's widths, per
GPU against one GPU. The rival is torchtitan's own parallelisation, compiled.
"""
import argparse
import json
import shlex
import subprocess
import tempfile
from pathlib import Path

from timeline import draw

BASE = "--config configs/run/bench-gpu.toml"
# Pipelines run four layers and 16 micro-batches.
PIPELINE = "--set model.num_hidden_layers=4 --set phase.0.batch=16"


def last_json(command):
    run = subprocess.run(shlex.split(command), capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode or not lines:
        print(f"failed ({run.returncode}): {command}\n{(run.stdout + run.stderr)[-1500:]}")
        return None
    return json.loads(lines[-1])


class Bench:
    def __init__(self, args):
        self.args, self.found = args, []

    def ours(self, name, ranks, settings, extra=""):
        command = f"{self.args.ours} {BASE} --multi-gpu --steps {self.args.steps} {settings} {extra}"
        row = last_json(command if ranks == 1 else f"{self.args.mpirun} -n {ranks} {command}")
        if row:
            self.found.append({"name": name} | row)
        return row

    def rival(self, name, ranks, options):
        row = last_json(f"{self.args.rival.format(ranks=ranks)} {options}")
        if row:
            self.found.append({"name": name} | row)
        return row


def links(bench, ranks):
    print(f"\nlinks: {ranks} GPUs, 4096 rows to each other one; µs")
    print(f"  {'':6}{'':5}{'alone':>8}{'in a row':>10}{'GB/s':>7}{'hidden':>8}{'counts':>8}{'quantise':>10}{'pack':>7}{'sum':>7}")
    for transport in ("peer", "nccl"):
        row = bench.ours(f"links {transport}", ranks, f"--set parallel.transport={transport} --set phase.0.batch={ranks}", "--links")
        for name in ("fp8", "bf16") if row else ():
            one = row[name]
            print(f"  {transport:6}{name:5}{one['alone_us']:8.0f}{one['chain_us']:10.0f}{one['gb_per_s']:7.0f}{one['hidden']:8.0%}"
                  f"{row['counts_us']:8.0f}{row['quantise_us']:10.0f}{row['pack_us']:7.0f}{row['sum_us']:7.0f}")


def line(name, row, one, rival=None):
    if not row:
        return print(f"  {name:34} failed")
    text = f"  {name:34}{row['fwd_bwd_ms']:9.1f}{row['step_ms']:9.1f}"
    share = lambda of, per: of["fwd_bwd_ms"] * per / row["fwd_bwd_ms"]
    if one:
        text += f"{share(*one):10.2f}"
    if rival:
        text += f"{rival['fwd_bwd_ms'] / row['fwd_bwd_ms']:10.2f}"
    print(text)


def steps(bench, args):
    ranks = args.ranks
    print(f"\nsteps: milliseconds of forward + backward and of all; per GPU against one GPU; torchtitan's time over ours")
    print(f"  {'':34}{'fwd+bwd':>9}{'step':>9}{'of one':>10}{'× rival':>10}")
    alone, theirs = bench.ours("one", 1, ""), bench.rival("rival one", 1, "one")
    line("torchtitan, one GPU", theirs, None)
    line("one GPU", alone, None, theirs)
    one = (alone, 1) if alone else None
    if "ep" in args.only:
        rival = bench.rival("rival ep", ranks, "ep")
        line(f"torchtitan, ep {ranks}", rival, (theirs, 1) if theirs else None)
        ep = f"--set parallel.ep={ranks} --set model.n_routed_experts={16 * ranks}"
        for transport in ("peer", "nccl"):
            trace = f"--trace {args.trace_ep}" if args.trace_ep and transport == "peer" else ""
            row = bench.ours(f"ep {transport}", ranks, f"{ep} --set phase.0.batch={ranks} --set parallel.transport={transport}", trace)
            line(f"ep {ranks}, {transport}", row, one, rival)
        eight = bench.ours("one, 8 micro-batches", 1, "--set phase.0.batch=8")
        for schedule in ("1f1b", "paired"):
            trace = f"--trace {Path(args.folder) / 'paired.json'}" if schedule == "paired" else ""
            row = bench.ours(f"ep {schedule} 8", ranks, f"{ep} --set phase.0.batch={8 * ranks} --set parallel.schedule={schedule}", trace)
            line(f"ep {ranks}, 8 micro-batches, {schedule}", row, (eight, 1) if eight else None)
        if args.timeline:
            draw(sorted(Path(args.folder).glob("paired.*.json")), args.timeline)
    if "dp" in args.only:
        rival = bench.rival("rival ddp", ranks, "ddp")
        line(f"torchtitan, ddp {ranks}", rival, (theirs, 1) if theirs else None)
        line(f"dp {ranks}, ZeRO-1", bench.ours("dp", ranks, f"--set phase.0.batch={ranks}"), one, rival)
    if "pp" in args.only:
        rival = bench.rival("rival pp", ranks, "pp:1F1B --micro-batches 16 --layers 4 --rounds 3")
        line(f"torchtitan, pp {ranks}, 1F1B", rival, None)
        whole = bench.ours("one, 4 layers", 1, PIPELINE)
        line("one GPU, 4 layers, 16 micro-batches", whole, None)
        for schedule in ("1f1b", "zb1p", "dualpipe"):
            row = bench.ours(f"pp {schedule}", ranks, f"{PIPELINE} --set parallel.pp={ranks} --set parallel.schedule={schedule}")
            line(f"pp {ranks}, {schedule}", row, (whole, 1 / ranks) if whole else None, rival)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", required=True)
    parser.add_argument("--rival", required=True, help="{ranks} is filled in")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["links", "ep", "dp", "pp"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json")
    parser.add_argument("--timeline")
    parser.add_argument("--trace-ep", help="the profiler's trace of a step under ep, FILE.json: FILE.RANK.json")
    args = parser.parse_args()
    args.folder = tempfile.mkdtemp()
    bench = Bench(args)
    if "links" in args.only:
        links(bench, args.ranks)
    if set(args.only) - {"links"}:
        steps(bench, args)
    if args.json:
        Path(args.json).write_text(json.dumps(bench.found, indent=1))


if __name__ == "__main__":
    main()
