"""Several GPUs of one host, ours and the rival's in one run: scripts/bench.sh multi-gpu calls this.

    multi_gpu.py --ours CMD --rival CMD --ranks N [--only links,ep,dp,pp] [--no-rival] [--json FILE] [--timeline FILE.svg]
                 [--mpirun CMD]

Links: every GPU sends every other one 4096 rows of 7168, as dispatch does in FP8 and combine in BF16, by copy engine
(`peer`) and over NCCL: alone, posted ahead, in a row, and beside GEMMs. Steps: forward + backward and the whole step of V3's widths, per
GPU against one GPU; what is hidden and idle is from a trace (timeline.py). Forward + backward ends when every gradient is
with its owner; there it is added up in the update's first pass, which the whole step has. The rival's routes are forced to be
even; ours are made so, by the bias, on one sequence a rank, and one row has new sequences at each step. Ours of one GPU are the
slowest of all, each by itself and at once. The rival is torchtitan's own parallelisation, compiled.
"""
import argparse
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from multi_gpu_pipeline import pipelines
from timeline import draw, measure

BASE = "--config configs/run/bench-gpu.toml"
# Two GPUs' pipelines run four layers and 16 micro-batches.
PIPELINE = "--set model.num_hidden_layers=4 --set phase.0.batch=16"
GIB = 2**30


def mpirun(ranks):
    """Each rank on cores of its own, more than one, as the launcher has them: mpirun binds two ranks to a core each."""
    return f"mpirun --map-by slot:PE={max(1, len(os.sched_getaffinity(0)) // ranks // 2)} --bind-to core"


# Seconds a row may take: what hangs is ended with its ranks, and the table goes on.
OURS, RIVAL = 120, 400


def last_json(command, limit):
    run = subprocess.run(["timeout", "--kill-after=10", str(limit), *shlex.split(command)], capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode or not lines:
        print(f"failed ({run.returncode}): {command}\n{(run.stdout + run.stderr)[-1500:]}", flush=True)
        return None
    return json.loads(lines[-1])


class Bench:
    def __init__(self, args):
        self.args, self.found = args, []

    def one(self, name, settings, **more):
        """One GPU's figure: the slowest of all, each by itself and at the same time, as they share the host's power and air."""
        each = f"{self.args.mpirun} -n {self.args.ranks} bash -c 'CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK exec \"$@\"' --"
        return self.ours(name, 1, settings, "--alone", launch=each, **more)

    def ours(self, name, ranks, settings, extra="", steps=None, trace=False, launch=None):
        """A row; with `trace` it holds what its ranks' traces say, and where they lie."""
        at = Path(self.args.folder) / f"{name.replace(' ', '-')}.json"
        command = f"{self.args.ours} {BASE} --multi-gpu --steps {steps or self.args.steps} {settings} {extra} {f'--trace {at}' if trace else ''}"
        if launch is None:
            launch = "" if ranks == 1 else f"{self.args.mpirun} -n {ranks}"
        row = self.keep(name, last_json(f"{launch} {command}", OURS))
        if row and trace:
            row["traces"] = [str(at.with_suffix(f".{rank}.json")) for rank in range(ranks)]
            try:
                row["trace"] = measure(row["traces"])
            except (OSError, ValueError, IndexError, ZeroDivisionError) as error:
                print(f"no figures of the traces of {name}: {error!r}", flush=True)
        return row

    def rival(self, name, ranks, options):
        if self.args.no_rival:
            return None
        return self.keep(name, last_json(f"{self.args.rival.format(ranks=ranks)} {options}", RIVAL))

    def keep(self, name, row):
        """Rows are written as they come: a table that is cut off leaves those before."""
        if row:
            row = {"name": name} | row
            self.found.append(row)
        if self.args.json:
            Path(self.args.json).write_text(json.dumps(self.found, indent=1))
        return row


def links(bench, ranks):
    print(f"\nlinks: {ranks} GPUs, 4096 rows to each other one; µs, and GB/s that a GPU sends")
    print(f"  {'':20}{'':5}{'alone':>8}{'GB/s':>6}{'posted':>8}{'GB/s':>6}{'in a row':>10}{'GB/s':>6}{'hidden':>8}{'counts':>8}{'quantise':>10}{'pack':>7}{'sum':>7}")
    cases = [("peer", "peer", ""), ("nccl", "nccl", "")]
    if ranks > 2:
        cases.append(("peer, two groups", "peer", f"--set parallel.ranks_per_node={ranks // 2}"))
    for label, transport, groups in cases:
        row = bench.ours(f"links {label}", ranks, f"--set parallel.transport={transport} --set phase.0.batch={ranks} {groups}", "--links")
        for name in ("fp8", "bf16") if row else ():
            one = row[name]
            print(f"  {label:20}{name:5}{one['alone_us']:8.0f}{one['gb_per_s']:6.0f}{one['queued_us']:8.0f}{one['gb_per_s'] * one['alone_us'] / one['queued_us']:6.0f}{one['chain_us']:10.0f}{one['chain_gb_per_s']:6.0f}{one['hidden']:8.0%}"
                  f"{row['counts_us']:8.0f}{row['quantise_us']:10.0f}{row['pack_us']:7.0f}{row['sum_us']:7.0f}", flush=True)
    print("  alone: from idle GPUs, with the host's posting; posted: by hosts that are ahead of their GPUs, as in a step")
    print("  pack: quantised straight to its place among the rows of its destination; sum: what came back and is added up")
    print("  hidden: 1 − (GEMMs and exchanges together − GEMMs) ÷ exchanges, medians of rounds of all three; a GEMM is 1.5 exchanges long")


def line(name, row, one=None, rival=None):
    """`one`: a row and how much of its time is a GPU's share."""
    if not row:
        return print(f"  {name:40} failed", flush=True)
    text = f"  {name:40}{row['fwd_bwd_ms']:9.1f}{row['step_ms']:9.1f}"
    for key in ("fwd_bwd_ms", "step_ms"):
        text += f"{one[0][key] * one[1] / row[key]:8.2f}" if one else f"{'':8}"
    for key in ("fwd_bwd_ms", "step_ms"):
        text += f"{rival[key] / row[key]:9.2f}" if rival else f"{'':9}"
    trace = row.get("trace")
    text += f"{trace['all']['hidden']:8.0%}" if trace and trace["all"]["hidden"] is not None else f"{'':8}"
    text += f"{trace['idle']:7.1%}" if trace else f"{'':7}"
    if "memory" in row:
        text += f"{(row['memory']['peak'] + row['memory']['buffers']) / GIB:7.1f}"
    if "busiest_rank" in row:
        text += f"{row['busiest_rank']:9.2f}"
    print(text, flush=True)


def experts(bench, ranks, one, theirs):
    """Expert parallelism: weak scaling to all GPUs, the node-limited way, and what eight micro-batches hide."""
    share = (one, 1) if one else None
    of = lambda n: f"--set parallel.ep={n} --set model.n_routed_experts={16 * n} --set phase.0.batch={n}"
    rival = bench.rival("rival ep", ranks, "ep")
    if rival:
        line(f"torchtitan, ep {ranks}", rival, (theirs, 1) if theirs else None)
    for count in (n for n in (2, 4, 8) if n < ranks):
        line(f"ep {count}, {16 * count} experts", bench.ours(f"ep {count}", count, of(count)), share)
    line(f"ep {ranks}, {16 * ranks} experts", bench.ours("ep peer", ranks, of(ranks), trace=True), share, rival)
    line(f"ep {ranks}, nccl", bench.ours("ep nccl", ranks, f"{of(ranks)} --set parallel.transport=nccl"), share, rival)
    line(f"ep {ranks}, new sequences at each step", bench.ours("ep new", ranks, of(ranks), "--new-sequences"), share)
    if ranks > 2:
        groups = f"--set parallel.ranks_per_node={ranks // 2} --set model.n_group=2 --set model.topk_group=1"
        line(f"ep {ranks}, two groups, a token to one", bench.ours("ep groups", ranks, f"{of(ranks)} {groups}"), share)
    eight = bench.one("one, 8 micro-batches", "--set phase.0.batch=8", steps=3)
    for schedule in ("1f1b", "paired"):
        row = bench.ours(f"ep {schedule} 8", ranks, f"{of(ranks)} --set phase.0.batch={8 * ranks} --set parallel.schedule={schedule}", steps=3, trace=True)
        line(f"ep {ranks}, 8 micro-batches, {schedule}", row, (eight, 1) if eight else None)
        if row and "trace" in row:
            rows = row["trace"]["middle"]
            print(f"      experts' rows: {rows['bytes'] / 1e9:.2f} GB and {rows['ms']:.1f} ms from a GPU, {rows['exposed_ms']:.1f} ms exposed = {rows['exposed_ms'] / max(rows['ms'], 1e-9):.0%}")
            if schedule == "paired" and bench.args.timeline:
                draw(row["traces"], bench.args.timeline)


def data(bench, ranks, one, theirs):
    rival = bench.rival("rival ddp", ranks, "ddp")
    share = (one, 1) if one else None
    if rival:
        line(f"torchtitan, ddp {ranks}", rival, (theirs, 1) if theirs else None)
    rows = [(f"dp {ranks}, ZeRO-1", "dp", f"--set phase.0.batch={ranks}")]
    if ranks > 2:
        half = ranks // 2
        rows.append((f"dp 2 × ep {half}, {16 * half} experts", "dp ep", f"--set phase.0.batch={ranks} --set parallel.ep={half} --set model.n_routed_experts={16 * half}"))
    for label, name, settings in rows:
        row = bench.ours(name, ranks, settings, trace=True)
        line(label, row, share, rival if name == "dp" else None)
        for what, key in (("gradients, reduce-scatter", "reduce"), ("weights, all-gather", "gather")) if row and name == "dp" else ():
            part = row.get("trace", {}).get(key)
            if part and part["ms"]:
                print(f"      {what}: {part['bytes'] / 1e9:.2f} GB and {part['ms']:.1f} ms from a GPU, {part['hidden']:.0%} hidden")
        if row and one:
            print(f"      optimizer: {row['memory']['optimizer'] / GIB:.2f} GiB a rank, one GPU {one['memory']['optimizer'] / GIB:.2f}")


def two_gpu_pipeline(bench):
    rival = bench.rival("rival pp", 2, "pp:1F1B --micro-batches 16 --layers 4 --rounds 3")
    if rival:
        line("torchtitan, pp 2, 1F1B", rival)
    whole = bench.one("one, 4 layers", PIPELINE, steps=3)
    line("one GPU, 4 layers, 16 micro-batches", whole)
    for schedule in ("1f1b", "zb1p", "dualpipe"):
        row = bench.ours(f"pp {schedule}", 2, f"{PIPELINE} --set parallel.pp=2 --set parallel.schedule={schedule}", steps=3, trace=True)
        line(f"pp 2, {schedule}", row, (whole, 1 / 2) if whole else None, rival)


def steps(bench, args):
    ranks = args.ranks
    print("\nsteps: milliseconds of forward + backward and of all; one GPU's over them, per GPU, of both; torchtitan's over ours; transfers")
    print("  hidden under kernels; GPUs idle from the update to the last weights' gradient; GiB; rows of the busiest rank over an even share")
    print(f"  {'':40}{'fwd+bwd':>9}{'step':>9}{'of one':>8}{'step':>8}{'× rival':>9}{'step':>9}{'hidden':>8}{'idle':>7}{'peak':>7}{'busiest':>9}")
    one, theirs = bench.one("one", "", trace=True), bench.rival("rival one", 1, "one")
    if theirs:
        line("torchtitan, one GPU", theirs)
    line("one GPU", one, None, theirs)
    if "ep" in args.only:
        experts(bench, ranks, one, theirs)
    if "dp" in args.only:
        data(bench, ranks, one, theirs)
    if "pp" in args.only and ranks == 2:
        two_gpu_pipeline(bench)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", required=True)
    parser.add_argument("--rival", required=True, help="{ranks} is filled in")
    parser.add_argument("--ranks", type=int, required=True, choices=[2, 4, 8])
    parser.add_argument("--mpirun", help="absent: with a share of the cores for each rank")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["links", "ep", "dp", "pp"])
    parser.add_argument("--no-rival", action="store_true")
    parser.add_argument("--steps", type=int, default=20, help="of one micro-batch; a GPU at its power limit takes a second or two to come to its clocks")
    parser.add_argument("--json")
    parser.add_argument("--timeline", help="FILE.svg of a paired step, and of DualPipe's FILE.pp.svg")
    parser.add_argument("--traces", help="keep the profiler's traces there")
    args = parser.parse_args()
    args.mpirun = args.mpirun or mpirun(args.ranks)
    args.folder = args.traces or tempfile.mkdtemp()
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    if "links" in args.only:
        links(bench, args.ranks)
    if {"ep", "dp"} & set(args.only) or args.ranks == 2 and "pp" in args.only:
        steps(bench, args)
    if "pp" in args.only and args.ranks > 2:
        pipelines(bench, args.ranks)
    if args.json:
        Path(args.json).write_text(json.dumps(bench.found, indent=1))


if __name__ == "__main__":
    main()
