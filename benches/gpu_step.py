"""A training step on one GPU, ours and the rival's in one run: scripts/bench.sh gpu-step calls this.

    python3 benches/gpu_step.py --ours COMMAND --rival COMMAND [--json FILE] [--top N]

Ours runs once a precision and leaves a trace, from which the table says where the milliseconds go.
"""
import argparse
import json
import re
import shlex
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

GIB = 2**30


def last_json(command):
    run = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode != 0 or not lines:
        return None, (run.stdout + run.stderr)[-1500:]
    return json.loads(lines[-1]), ""


def kernels(trace):
    """(milliseconds, launches, name) by kernel, and from the first to the last of them."""
    sums, first, last = defaultdict(lambda: [0.0, 0]), float("inf"), 0.0
    for event in json.loads(Path(trace).read_text())["traceEvents"]:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        # Of a templated name what tells one kernel from another: the end of the template is as telling as its start.
        name = re.sub(r"\s+", " ", event["name"])
        name = name if len(name) < 110 else name[:60] + " … " + name[-47:]
        sums[name][0] += event["dur"] / 1e3
        sums[name][1] += 1
        first, last = min(first, event["ts"]), max(last, event["ts"] + event["dur"])
    rows = sorted(((ms, count, name) for name, (ms, count) in sums.items()), reverse=True)
    return rows, (last - first) / 1e3


# Kernels of GEMMs outside attention, by the precision of their operands.
GEMMS = {"FP8": r"gemm_(forward|wgrad)$", "BF16": r"nvjet_.*_ts[ts]_|_bf16_|bf16bf16", "FP32": r"_f32f32_f32f32_f32_.*gemm|_gemm_f32f32_f32f32"}


def show(ours, trace, top):
    memory = ours["memory"]
    print(f"\n{ours['precision']}: forward+backward {ours['fwd_bwd_ms']:.1f} ms, step {ours['step_ms']:.1f} ms, loss {ours['loss']:.4f}")
    floor = ours["optimizer_floor_ms"]
    print(f"  optimizer and norm: {ours['step_ms'] - ours['fwd_bwd_ms']:.1f} ms, floor {floor:.1f} ms at {ours['copy_tb_per_s']:.2f} TB/s of a copy")
    parts = ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in ("weights", "gradients", "optimizer", "activations", "peak"))
    print(f"  GiB: {parts}; kept for backward, without logits {ours['saved_bytes'] / GIB:.2f}")
    if not Path(trace).exists():
        return
    rows, wall = kernels(trace)
    busy = sum(ms for ms, _, _ in rows)
    print(f"  one step under the tracer: {busy:.1f} ms of kernels in {wall:.1f} ms")
    # A product that is split along K shows as two kernels.
    of = lambda pattern: [(ms, count) for ms, count, name in rows if re.search(pattern, name)]
    counts = {kind: (sum(c for _, c in of(pattern)), sum(ms for ms, _ in of(pattern))) for kind, pattern in GEMMS.items()}
    print("  GEMM kernels: " + ", ".join(f"{count} {kind} ({ms:.1f} ms)" for kind, (count, ms) in counts.items()))
    for ms, count, name in rows[:top]:
        print(f"  {ms:8.3f} ms {count:5}  {name}")
    rest = rows[top:]
    print(f"  {sum(ms for ms, _, _ in rest):8.3f} ms {sum(count for _, count, _ in rest):5}  the other {len(rest)}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", required=True)
    parser.add_argument("--rival", required=True)
    parser.add_argument("--json")
    parser.add_argument("--top", type=int, default=40)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    folder, found = Path(tempfile.mkdtemp()), {}
    rival, why = last_json(shlex.split(args.rival))
    for precision in ("bf16", "fp8"):
        trace = folder / f"{precision}.json"
        command = [*shlex.split(args.ours), "--set", f"run.precision={precision}", "--steps", str(args.steps), "--trace", str(trace)]
        found[precision], failure = last_json(command)
        if found[precision] is None:
            raise SystemExit(f"ours in {precision} failed:\n{failure}")
        show(found[precision], trace, args.top)
    if rival is None:
        print(f"\nthe rival failed:\n{why}")
    else:
        found["rival"] = rival
        print(f"\n{rival['name']}: forward+backward {rival['fwd_bwd_ms']:.1f} ms, step {rival['step_ms']:.1f} ms (no FP32 masters), peak {rival['peak_gib']:.1f} GiB")
        for precision in ("bf16", "fp8"):
            ours = found[precision]
            print(f"{precision}: {rival['fwd_bwd_ms'] / ours['fwd_bwd_ms']:.2f}x in forward+backward, {rival['step_ms'] / ours['step_ms']:.2f}x in the step")
    share = found["fp8"]["saved_bytes"] / found["bf16"]["saved_bytes"]
    print(f"kept for backward: FP8 {share:.0%} of BF16")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
