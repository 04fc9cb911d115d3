"""Does one way of training train as another does? One model, one seed, the same samples in the same order; all runs at once.
On one GPU: BF16, BF16 with another order of sums (over micro-batches of half as many sequences), and FP8. With --ranks N, in FP8:
one GPU, two of other orders of sums (over micro-batches of twice and half as many sequences), and N GPUs under expert
parallelism, the same with paired micro-batches, and DualPipe.

    python3 benches/loss_gpu.py --tiefsee "COMMAND" --corpus DIR --out DIR [--ranks N] [--mpirun COMMAND]

Prints the mean loss of the last steps of each and their gaps, and draws the curves into OUT/loss.svg.
"""
import argparse
import json
import shlex
import shutil
import subprocess
from pathlib import Path

# The first is what the others are held against; those with sums in another order say how far two orders lie apart.
ORDER = "order"


def micro_batches(of):
    return [f"phase.0.micro_batch={of}", f"phase.1.micro_batch={of}"]


PRECISIONS = {
    "bf16": ["run.precision=bf16"],
    "bf16, sums in another order": ["run.precision=bf16", *micro_batches(8)],
    "fp8": ["run.precision=fp8"],
}
# 300 steps of four micro-batches.
SHORT = ["phase.1.tokens=1638400", *micro_batches(4)]


def layouts(ranks):
    ep, pp = f"parallel.ep={ranks}", f"parallel.pp={ranks}"
    return {
        "one GPU": [],
        "one GPU, order of 8 a micro-batch": micro_batches(8),
        "one GPU, order of 2 a micro-batch": micro_batches(2),
        f"ep {ranks}": [ep],
        f"ep {ranks}, paired": [ep, "parallel.schedule=paired"],
        f"pp {ranks}, DualPipe": [pp, "parallel.schedule=dualpipe"],
    }


def start(args, name, sets):
    folder = args.out
    directory = folder / name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(directory, ignore_errors=True)  # of the last time
    sets = [*(SHORT if args.ranks > 1 else []), *sets, f"run.dir={directory}", f"data.mixture.0.path={args.corpus}"]
    several = any(value.startswith("parallel.") for value in sets)
    words = shlex.split(f"{args.mpirun} -n {args.ranks} {args.tiefsee}" if several else args.tiefsee)
    words += ["train", "--config", args.config, *(word for value in sets for word in ("--set", value))]
    said = open(folder / f"{directory.name}.log", "w+")
    return directory, said, subprocess.Popen(words, stdout=said, stderr=said)


def losses(name, directory, said, run):
    if run.wait() != 0:
        said.seek(0)
        raise SystemExit(f"{name}: {said.read()[-2000:]}")
    lines = [json.loads(line) for line in (directory / "log/rank-0.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    print(f"{name:<34} {len(steps)} steps, {sum(not line['applied'] for line in steps)} skipped", flush=True)
    return [line["loss"] for line in steps]


def smooth(values, width=20):
    return [sum(values[max(0, i - width + 1): i + 1]) / len(values[max(0, i - width + 1): i + 1]) for i in range(len(values))]


def draw(curves, path):
    width, height, edge = 900, 480, 50
    low = min(min(curve) for curve in curves.values())
    high = max(max(curve) for curve in curves.values())
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">']
    lines.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for (name, curve), colour in zip(curves.items(), ("#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")):
        x = lambda i: edge + i * (width - 2 * edge) / max(1, len(curve) - 1)
        y = lambda v: edge + (high - v) * (height - 2 * edge) / (high - low)
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(curve))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2" opacity="0.8"/>')
        row = list(curves).index(name)
        lines.append(f'<text x="{width - 280}" y="{edge + 16 * row}" fill="{colour}">{name}</text>')
    for value in (low, high):
        lines.append(f'<text x="4" y="{edge + (high - value) * (height - 2 * edge) / (high - low):.0f}">{value:.2f}</text>')
    lines.append(f'<text x="{edge}" y="{height - 12}">loss, mean of 20 steps, over {len(curve)} steps</text></svg>')
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiefsee", default="target/release/tiefsee")
    parser.add_argument("--config", default="configs/run/loss-gpu.toml")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--mpirun", default="mpirun")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted, last = (layouts(args.ranks), 100) if args.ranks > 1 else (PRECISIONS, 200)
    runs = {name: start(args, name, sets) for name, sets in wanted.items()}
    try:
        curves = {name: losses(name, *run) for name, run in runs.items()}
    finally:
        [run.terminate() for *_, run in runs.values()]  # where one has failed
    means = {name: sum(curve[-last:]) / len(curve[-last:]) for name, curve in curves.items()}
    first, *_ = means.values()
    gaps = {name: abs(mean / first - 1) for name, mean in means.items()}
    for name, mean in means.items():
        print(f"{name:<34} mean of the last {last} steps {mean:.5f}, {(mean / first - 1) * 100:+.3f} %")
    orders = [first, *(mean for name, mean in means.items() if ORDER in name)]
    between = max(orders) / min(orders) - 1
    failed = []
    for name in [name for name in list(wanted)[1:] if ORDER not in name]:
        passes = gaps[name] < 0.0025 or gaps[name] < 2 * between
        failed += [] if passes else [name]
        print(f"{name} {'passes' if passes else 'FAILS'}: its gap is {gaps[name]:.3%}, the largest between orders of sums {between:.3%}")
    draw({name: smooth(curve) for name, curve in curves.items()}, args.out / "loss.svg")
    if failed:
        raise SystemExit(f"the curves of {', '.join(failed)} lie too far apart")


if __name__ == "__main__":
    main()
