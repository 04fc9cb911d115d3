"""Does one way of training train as another does? One model, and for each seed the same samples in the same order; all runs at
once. On one GPU: BF16, BF16 with another order of sums (over micro-batches of half as many sequences), and FP8, each from --seeds
N seeds: a single one says little, as two runs part by some tenths of a percent whatever the cause. With --ranks N, in FP8 and
from one seed: one GPU, two of other orders of sums (over micro-batches of twice and half as many sequences), and N GPUs under
expert parallelism, the same with paired micro-batches, and DualPipe.

    python3 benches/loss_gpu.py --tiefsee "COMMAND" --corpus DIR --out DIR [--seeds N] [--ranks N] [--mpirun COMMAND]

Prints the mean loss of the last steps of each and its gap to the first of its seed, and draws the curves of the first seed into
OUT/loss.svg. A way of training passes if from every seed its gap is below 0.25 % or twice the largest between orders. The means
over the seeds are printed beside: they tell chance, which takes one seed this way and one that way, from a bias.
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
# 300 steps of half the batch, four micro-batches.
SHORT = ["phase.0.tokens=819200", "phase.1.tokens=1638400", "phase.0.batch=16", "phase.1.batch=16", *micro_batches(4)]


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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--mpirun", default="mpirun")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ways, last, seeds = (layouts(args.ranks), 100, [1]) if args.ranks > 1 else (PRECISIONS, 200, range(1, args.seeds + 1))
    wanted = {(way, seed): [*sets, f"run.seed={seed}"] for seed in seeds for way, sets in ways.items()}
    runs = {which: start(args, f"{which[0]}, seed {which[1]}", sets) for which, sets in wanted.items()}
    try:
        curves = {which: losses(f"{which[0]}, seed {which[1]}", *run) for which, run in runs.items()}
    finally:
        [run.terminate() for *_, run in runs.values()]  # where one has failed
    means = {which: sum(curve[-last:]) / len(curve[-last:]) for which, curve in curves.items()}
    first, *others = ways
    gaps = {way: [means[way, seed] / means[first, seed] - 1 for seed in seeds] for way in ways}
    for (way, seed), mean in means.items():
        print(f"{way:<34} seed {seed}: mean of the last {last} steps {mean:.5f}, {gaps[way][seed - 1] * 100:+.3f} %")
    failed = []
    for way in [way for way in others if ORDER not in way]:
        for at, seed in enumerate(seeds):
            orders = [gaps[order][at] for order in ways if order == first or ORDER in order]
            gap, between = abs(gaps[way][at]), max(orders) - min(orders)
            passes = gap < 0.0025 or gap < 2 * between
            failed += [] if passes else [f"{way}, seed {seed}"]
            print(f"{way}, seed {seed} {'passes' if passes else 'FAILS'}: its gap is {gap:.3%}, the largest between orders of sums {between:.3%}")
    for way in others if len(seeds) > 1 else []:
        print(f"{way}: {sum(gaps[way]) / len(seeds):+.3%}, the mean over {len(seeds)} seeds, which no verdict hangs on")
    draw({way: smooth(curves[way, 1]) for way in ways}, args.out / "loss.svg")
    if failed:
        raise SystemExit(f"the curves of {', '.join(failed)} lie too far apart")


if __name__ == "__main__":
    main()
