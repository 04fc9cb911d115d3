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
    """(milliseconds, launches, name) by kernel, from the first to the last of them, and (milliseconds, before, after) of
    what the device waited between two."""
    sums, spans = defaultdict(lambda: [0.0, 0]), []
    for event in json.loads(Path(trace).read_text())["traceEvents"]:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        # Of a templated name what tells one kernel from another: the end of the template is as telling as its start.
        name = re.sub(r"\s+", " ", event["name"])
        name = name if len(name) < 110 else name[:60] + " … " + name[-47:]
        sums[name][0] += event["dur"] / 1e3
        sums[name][1] += 1
        spans.append((event["ts"], event["ts"] + event["dur"], name))
    rows = sorted(((ms, count, name) for name, (ms, count) in sums.items()), reverse=True)
    spans.sort()
    gaps, (first, end, before) = [], spans[0]
    for start, stop, name in spans[1:]:
        if start > end:
            gaps.append(((start - end) / 1e3, before, name))
        if stop > end:
            end, before = stop, name
    return rows, (end - first) / 1e3, gaps


# Kernels of GEMMs outside attention, by the precision of their operands. The router's FP32 products are made of BF16 ones.
GEMMS = {"FP8": r"gemm_(forward|wgrad)$", "BF16": r"nvjet_.*_ts[ts]_|_bf16_|bf16bf16"}


def show(ours, trace, top):
    memory = ours["memory"]
    print(f"\n{ours['precision']}: forward+backward {ours['fwd_bwd_ms']:.1f} ms, step {ours['step_ms']:.1f} ms, loss {ours['loss']:.4f}")
    floor = ours["optimizer_floor_ms"]
    print(f"  optimizer and norm: {ours['step_ms'] - ours['fwd_bwd_ms']:.1f} ms, floor {floor:.1f} ms at {ours['copy_tb_per_s']:.2f} TB/s of a copy")
    parts = ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in ("weights", "gradients", "optimizer", "activations", "peak"))
    print(f"  GiB: {parts}")
    print(f"  GEMMs of a micro-batch, by the precision of their operands: {ours['gemms']}")
    if not Path(trace).exists():
        return
    rows, wall, gaps = kernels(trace)
    busy = sum(ms for ms, _, _ in rows)
    print(f"  one step under the tracer: {busy:.1f} ms of kernels in {wall:.1f} ms")
    long = sorted((gap for gap in gaps if gap[0] > 0.02), reverse=True)
    print(f"  nothing runs for {sum(ms for ms, _, _ in gaps):.1f} ms, {sum(ms for ms, _, _ in long):.1f} of it in {len(long)} gaps above 0.02 ms:")
    for ms, before, after in long[:12]:
        print(f"  {ms:8.3f} ms  {before[:60]} | {after[:60]}")
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
        with_masters = f"{rival['step_masters_ms']:.1f} ms" if rival["step_masters_ms"] else "does not fit"
        print(f"\n{rival['name']}: forward+backward {rival['fwd_bwd_ms']:.1f} ms, step {rival['step_ms']:.1f} ms without FP32 masters, {with_masters} with, peak {rival['peak_gib']:.1f} GiB")
        for precision in ("bf16", "fp8"):
            ours = found[precision]
            print(f"{precision}: {rival['fwd_bwd_ms'] / ours['fwd_bwd_ms']:.2f}x in forward+backward, {rival['step_ms'] / ours['step_ms']:.2f}x in the step")
    for bf16, fp8 in zip(found["bf16"]["kept"], found["fp8"]["kept"]):
        again = ", ".join(name for name, on in bf16["recompute"].items() if on) or "nothing"
        print(f"\nkept for backward, without logits, made again: {again}\n{'GiB':<28} {'BF16':>8} {'FP8':>8}")
        for part, size in sorted(bf16["parts"].items(), key=lambda part: -part[1]):
            print(f"{part:<28} {size / GIB:8.3f} {fp8['parts'][part] / GIB:8.3f}")
        print(f"{'as the allocator has it':<28} {bf16['bytes'] / GIB:8.3f} {fp8['bytes'] / GIB:8.3f}, FP8 {fp8['bytes'] / bf16['bytes']:.1%} of BF16")
    print(f"peak GiB: BF16 {found['bf16']['memory']['peak'] / GIB:.2f}, FP8 {found['fp8']['memory']['peak'] / GIB:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
